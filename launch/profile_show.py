"""`copus profile show`: what throughput tables know: samples/s over global batch for each layout, and failures."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from copus.job import JobError, load_job
from launch.run_directory import find_run, shown
from launch.wording import count
from planner.wording import duration, three_digits
from profiles.config import ProfileConfig
from profiles.measurement import Measurement
from profiles.query import Filter, Summary, groups, query


@dataclass(frozen=True)
class Best:
    """The fastest micro-batch of a layout at a global batch."""

    measurement: Measurement
    """What was measured."""

    @property
    def rate(self) -> float:
        """Sequences a second."""
        return self.measurement.samples_per_second

    @property
    def spread(self) -> float:
        """Half-width of its interval, sequences a second."""
        seconds, spread = self.measurement.step_seconds, self.measurement.spread_seconds
        return self.rate * (spread or 0.0) / seconds if seconds else 0.0


Lines = dict[str, dict[int, Best]]
"""Layout → global batch → the fastest."""


def show(places: list[str], table: Path | None, wanted: Filter, picture: Path | None, *, as_json: bool = False) -> int:
    """Print, and draw, what is known. Raises JobError for tables and filters that cannot be."""
    tables, wanted = _resolve(places, table, wanted)
    try:
        found = query(tables, wanted)
    except OSError as error:
        raise JobError(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise JobError(f"--{error}") from None
    if picture is not None:
        from launch.profile_plot import save_lines

        save_lines(groups(found), picture)
    if as_json:
        print(json.dumps({"tables": [str(table) for table in tables], "rows": [_values(each) for each in found]}))
        return 0
    if not found:
        print(
            f"nothing in {', '.join(shown(table) for table in tables)}"
            + " that fits the filter" * (wanted != Filter())
            + "; copus profile JOB.yaml measures"
        )
    for position, members in enumerate(groups(found).values()):
        print("\n" * (position > 0) + "\n".join(_group_lines(members)))
    if picture is not None:
        print(f"\n{shown(picture.absolute())}")
    return 0


def _resolve(places: list[str], table: Path | None, wanted: Filter) -> tuple[list[Path], Filter]:
    """Table files, and the filter with the models of the jobs that were named. `table` stands for that of every job."""
    models = []
    tables = [] if table is None else [table.expanduser().absolute()]
    for place in places:
        path = Path(place).expanduser()
        if path.suffix in (".yaml", ".yml"):
            job = load_job(path)
        elif path.is_file() or path.suffix == ".jsonl":
            tables.append(path.absolute())
            continue
        else:
            try:
                job = load_job(find_run(place) / "job.yaml")
            except JobError as error:
                raise JobError(f"{place}: no table, job file or run: {error}") from None
        if table is None:
            tables.append(job.profile.table.expanduser().absolute())
        models.append(job.model.digest)
    if not wanted.models:
        wanted = replace(wanted, models=tuple(models))
    return list(dict.fromkeys(tables)) or [ProfileConfig().table.expanduser().absolute()], wanted


def _values(each: Summary) -> dict[str, object]:
    measurement = each.measurement
    return {
        **measurement.model_dump(mode="json"),
        "label": measurement.configuration.label,
        "samples_per_second": measurement.samples_per_second,
        "rows": each.rows,
    }


def fastest(members: Iterable[Summary]) -> Lines:
    """For each layout and global batch the fastest micro-batch, layouts in order of the batch that they are best at."""
    lines: Lines = {}
    for each in members:
        measurement = each.measurement
        if measurement.step_seconds is None:
            continue
        line = lines.setdefault(measurement.configuration.layout.label, {})
        batch = measurement.configuration.global_batch
        if batch not in line or line[batch].rate < measurement.samples_per_second:
            line[batch] = Best(measurement)
    return {layout: dict(sorted(line.items())) for layout, line in lines.items()}


def winners(lines: Lines) -> list[tuple[int, str]]:
    """The fastest layout at each global batch, ascending."""
    batches = sorted({batch for line in lines.values() for batch in line})
    return [
        (batch, max((layout for layout in lines if batch in lines[layout]), key=lambda name: lines[name][batch].rate))
        for batch in batches
    ]


def heading(measurement: Measurement) -> str:
    """What a group of rows is about, in one line."""
    model, print_ = measurement.model, measurement.fingerprint
    what = "shards alone, without network" if measurement.shard else "steps"
    return (
        f"{count(model.parameters)} parameters ({model.layers} layers of {model.hidden}, {model.seq_len} tokens), "
        f"{print_.precision}, {print_.hardware}: {what}"
    )


def _group_lines(members: list[Summary]) -> Iterable[str]:
    one = members[0].measurement
    lines = fastest(members)
    yield heading(one)
    yield f"model {one.fingerprint.model} · {one.fingerprint.backend} · {one.fingerprint.software}"
    if lines:
        yield "samples/s with the best micro-batch (m); * the fastest"
        yield from _matrix(lines)
        if not one.shard:  # which of the layouts is fast depends on the network too
            yield "fastest: " + _in_words(winners(lines))
    failed = [each for each in members if each.measurement.failure is not None]
    for each in failed:
        yield f"failed: {each.measurement.configuration.label}: {each.measurement.failure}"
    steps = sum(each.measurement.count for each in members)
    spent = sum(each.measurement.count * (each.measurement.step_seconds or 0) for each in members)
    yield f"{len(members)} configurations, {steps} steps timed in {duration(spent)}, {len(failed)} failed"


def _matrix(lines: Lines) -> Iterable[str]:
    best = dict(winners(lines))
    header = ["batch", *map(str, best)]
    rows = [header]
    for layout, line in lines.items():
        cells = [
            f"{three_digits(line[batch].rate)} m{line[batch].measurement.configuration.micro_batch}"
            + " *"[winner == layout]
            if batch in line
            else "· "
            for batch, winner in best.items()
        ]
        rows.append([layout, *cells])
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _in_words(best: list[tuple[int, str]]) -> str:
    """`TP2·PP1·DP1 at 2 to 8, TP1·PP1·DP2 at 16 to 64`."""
    spans = []
    for layout, batches in groupby(best, key=lambda item: item[1]):
        values = [batch for batch, _ in batches]
        spans.append(f"{layout} at {values[0]}" + (f" to {values[-1]}" if len(values) > 1 else ""))
    return ", ".join(spans)
