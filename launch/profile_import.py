"""`copus profile import`: measurements of others, from CSV files or other tables, into a throughput table."""

from collections import Counter
from pathlib import Path

from copus.job import JobError
from launch.json_output import as_json_line
from launch.run_directory import shown
from profiles.config import ProfileConfig
from profiles.measurement import Measurement
from profiles.published import read_csv
from profiles.table import ThroughputTable


def import_rows(sources: list[Path], table_path: Path | None, *, as_json: bool = False) -> int:
    """Add what the table does not have yet, each row once. Raises JobError, and adds nothing, if a file cannot be
    read."""
    table = ThroughputTable((table_path or ProfileConfig().table).expanduser().absolute())
    rejected: Counter[str] = Counter()
    new: dict[Measurement, None] = {}
    try:
        present = {_without_time(row) for row in table.everything()}
        for source in sources:
            if source.suffix.lower() == ".csv":
                read = read_csv(source.expanduser())
                rejected += read.rejected
                # A file has no time of its own: a copy of it, imported again, is nothing new.
                rows = {_without_time(row): row for row in reversed(read.measurements)}
                new |= dict.fromkeys(rows[key] for key in reversed(rows) if key not in present)
            else:
                from profiles.query import read_new

                new |= dict.fromkeys(read_new([source.expanduser()], table.path))
        table.extend(new)
    except OSError as error:
        raise JobError(f"{shown(Path(error.filename or table.path))}: {error.strerror or error}") from None
    except ValueError as error:
        raise JobError(str(error)) from None
    failures = sum(row.failure is not None for row in new)
    if as_json:
        print(as_json_line({"table": str(table.path), "added": len(new), "failures": failures, "rejected": rejected}))
    else:
        print(f"{len(new)} rows added to {shown(table.path)}, {failures} of them failures")
        for reason, count in rejected.most_common():
            print(f"  {count} left out: {reason}")
    return 0


def _without_time(row: Measurement) -> Measurement:
    return row.model_copy(update={"time": 0.0})
