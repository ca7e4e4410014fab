"""`copus profile show`: what throughput tables know: samples/s over global batch for each layout, and failures."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from copus.job import JobError, load_job
from launch.json_output import as_json_line
from launch.lines import LinePoint, Lines, heading, lines_of, winners
from launch.run_directory import find_run, shown
from profiles.config import ProfileConfig
from profiles.formatting import duration, three_digits
from profiles.query import Filter, Summary, groups, query


def show(places: list[str], table: Path | None, wanted: Filter, picture: Path | None, *, as_json: bool = False) -> int:
    """Print, and draw, what is known. Raises JobError for tables and filters that cannot be."""
    tables, wanted = _resolve(places, table, wanted)
    try:
        summaries = query(tables, wanted)
    except FileNotFoundError as error:
        raise JobError(f"{error.filename}: {error.strerror}; copus profile JOB.yaml measures") from None
    except OSError as error:
        raise JobError(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise JobError(f"--{error}") from None
    if picture is not None:
        from launch.profile_plot import save_lines

        save_lines(groups(summaries), picture)
    if as_json:
        print(
            as_json_line(
                {"tables": [str(table) for table in tables], "rows": [_values(summary) for summary in summaries]}
            )
        )
        return 0
    if not summaries:
        print(
            f"nothing in {', '.join(shown(table) for table in tables)}"
            + " that fits the filter" * (wanted != Filter())
            + "; copus profile JOB.yaml measures"
        )
    for position, members in enumerate(groups(summaries).values()):
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


def _values(summary: Summary) -> dict[str, object]:
    measurement = summary.measurement
    return {
        **measurement.model_dump(mode="json"),
        "label": measurement.configuration.label,
        "samples_per_second": measurement.samples_per_second,
        "rows": summary.rows,
    }


def _group_lines(members: list[Summary]) -> Iterable[str]:
    one = members[0].measurement
    lines = lines_of(members)
    yield heading(one)
    yield f"model {one.fingerprint.model} · {one.fingerprint.backend} · {one.fingerprint.software}"
    if lines:
        yield "samples/s with the best micro-batch (m); * the fastest"
        yield from _matrix(lines)
        if not one.shard:  # which of the layouts is fast depends on the network too
            yield "fastest: " + _in_words(winners(lines))
    failed = [summary for summary in members if summary.measurement.failure is not None]
    for summary in failed:
        yield f"failed: {summary.measurement.configuration.label}: {summary.measurement.failure}"
    steps = sum(summary.measurement.count for summary in members)
    spent = sum(summary.measurement.count * (summary.measurement.step_seconds or 0) for summary in members)
    yield f"{len(members)} configurations, {steps} steps timed in {duration(spent)}, {len(failed)} failed"


def _matrix(lines: Lines) -> Iterable[str]:
    best = winners(lines)
    rows = [["batch", *(str(point.batch) for point in best)]]
    for layout, line in lines.items():
        by_batch = {point.batch: point for point in line}
        cells = []
        for top in best:
            point = by_batch.get(top.batch)
            cells.append(
                "· " if point is None else f"{three_digits(point.rate)} m{point.micro_batch}" + " *"[point == top]
            )
        rows.append([layout, *cells])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _in_words(best: list[LinePoint]) -> str:
    """`TP2·PP1·DP1 at 2 to 8, TP1·PP1·DP2 at 16 to 64`."""
    spans = []
    for layout, points in groupby(best, key=lambda point: point.layout):
        batches = [point.batch for point in points]
        spans.append(f"{layout} at {batches[0]}" + (f" to {batches[-1]}" if len(batches) > 1 else ""))
    return ", ".join(spans)
