"""Throughput tables as one: merged, filtered and summarised with duckdb."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from profiles.measurement import Measurement
from profiles.model_shape import ModelShape
from profiles.record import Record
from profiles.table import ThroughputTable

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

FINGERPRINT = ("model", "precision", "backend", "hardware", "software")
DEGREES = ("tp", "pp", "vp", "cp", "ep", "etp", "dp", "zero")
LAYOUT = {**dict.fromkeys(DEGREES, "BIGINT"), "sequence_parallel": "BOOLEAN", "recompute": "VARCHAR"}


def _struct(fields: dict[str, str]) -> str:
    return f"STRUCT({', '.join(f'{name} {kind}' for name, kind in fields.items())})"


def _fields(record: type[Record]) -> dict[str, str]:
    """The fields of a record as duckdb types."""
    return {name: _type(field.annotation) for name, field in record.model_fields.items()}


def _type(annotation: Any) -> str:
    """A field's type in duckdb; any column may be null."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType] or [annotation]
    kind = kinds[0] if get_origin(annotation) in (Union, UnionType) else annotation
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, Record):
        return _struct(_fields(kind))
    return {int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN"}.get(kind, "VARCHAR")


SHAPE = _fields(ModelShape)

ROW = {
    "fingerprint": _struct(dict.fromkeys(FINGERPRINT, "VARCHAR")),
    "model": _struct(SHAPE),
    "configuration": _struct({"layout": _struct(LAYOUT), "micro_batch": "BIGINT", "global_batch": "BIGINT"}),
    **{"step_seconds": "DOUBLE", "spread_seconds": "DOUBLE", "count": "BIGINT", "peak_bytes": "BIGINT"},
    **{"failure": "VARCHAR", "shard": "BOOLEAN", "time": "DOUBLE"},
}
"""Columns of a table as duckdb types: the fields of `Measurement`."""

_COLUMNS = f"""
    fingerprint.model AS model, fingerprint.precision AS precision, fingerprint.backend AS backend,
    fingerprint.hardware AS hardware, fingerprint.software AS software,
    {", ".join(f"model.{name} AS {name}" for name in SHAPE)},
    {", ".join(f"configuration.layout.{name} AS {name}" for name in LAYOUT)},
    configuration.micro_batch AS micro_batch, configuration.global_batch AS global_batch,
    configuration.global_batch // (configuration.layout.dp * configuration.micro_batch) AS num_microbatches,
    step_seconds, spread_seconds, count, peak_bytes, failure, shard, time,
    configuration.global_batch / step_seconds AS samples_per_second,
    configuration.global_batch * model.seq_len / step_seconds AS tokens_per_second
"""
"""What `Filter.where` may name."""

_SUMMARY = """
WITH each AS (  -- a row stands as often as steps were timed for it, so that plain medians are weighted by steps
    SELECT *, unnest(range(greatest(count, 1))) FROM kept
), summed AS (
    SELECT fingerprint, model, configuration, shard,
        median(step_seconds) AS step_seconds, median(coalesce(spread_seconds, 0)) FILTER (failure IS NULL) AS within,
        mad(step_seconds) AS between_rows, max(peak_bytes) AS peak_bytes, count(*) FILTER (failure IS NULL) AS steps
    FROM each GROUP BY ALL
), newest AS (
    SELECT fingerprint, model, configuration, shard,
        last(failure ORDER BY time) AS failure, max(time) AS time, count(*) AS rows
    FROM kept GROUP BY ALL
)
SELECT * FROM summed JOIN newest USING (fingerprint, model, configuration, shard)
ORDER BY fingerprint, shard, configuration.layout, configuration.global_batch, configuration.micro_batch
"""
"""As `profiles.throughput` does it: the newest row decides whether a configuration runs, the median over all steps how
fast; the spread is that within the rows and that between them."""


@dataclass(frozen=True)
class Filter:
    """Which rows are wanted; what is None does not matter."""

    models: tuple[str, ...] = ()
    """Beginnings of the models' digests, one of which has to fit; empty for all models."""
    layout: str | None = None
    """Degrees that have to be so, the others free: `TP2·PP1`, `tp=2,dp=4`, `PP2 Z1 SP`."""
    hardware: str | None = None
    """A part of the name of the hardware, in any case."""
    where: str | None = None
    """A condition in SQL over the columns of a row: `global_batch >= 8 AND tokens_per_second > 1e4`."""

    def condition(self) -> tuple[str, list[Any]]:
        """The same in SQL, with its parameters. Raises ValueError for a layout that cannot be read."""
        parts, parameters = ["true"], list[Any]()
        if self.models:
            parts.append(f"({' OR '.join(['starts_with(model, ?)'] * len(self.models))})")
            parameters += self.models
        if self.hardware is not None:
            parts.append("contains(lower(hardware), lower(?))")
            parameters.append(self.hardware)
        for column, value in _degrees(self.layout or "").items():
            parts.append(f"{column} = ?")
            parameters.append(value)
        if self.where is not None:
            parts.append(f"({self.where}\n)")
        return " AND ".join(parts), parameters


@dataclass(frozen=True)
class Summary:
    """All rows of one configuration, on one hardware with one software."""

    measurement: Measurement
    """The rows as one: median step, spread within and between the rows, all steps counted, the time of the newest."""
    rows: int
    """How many there were."""


def query(tables: Sequence[Path], wanted: Filter | None = None) -> list[Summary]:
    """What tables know together, one entry for each configuration; rows that stand in several count once.

    Torn and foreign lines are passed over. Raises OSError for a table that cannot be read, ValueError, in one line, for
    a filter that cannot be.
    """
    condition, parameters = (wanted or Filter()).condition()
    with _open(tables) as database:
        import duckdb

        # The user's SQL sees the rows and nothing else: no files, no settings.
        database.execute("SET enable_external_access = false; SET lock_configuration = true")
        try:
            database.execute(
                f"CREATE TABLE kept AS SELECT rows.* FROM rows JOIN (SELECT id AS wanted FROM "
                f"(SELECT id, {_COLUMNS} FROM rows) WHERE {condition}) ON wanted = id",
                parameters,
            )
        except duckdb.Error as error:
            raise ValueError(f"where {wanted and wanted.where}: {str(error).splitlines()[0]}") from None
        records = _records(database, _SUMMARY)
    return [_summary(record) for record in records]


def read_new(sources: Sequence[Path], table: Path) -> list[Measurement]:
    """The rows of `sources` that `table` does not have yet, oldest first, each once. The table need not exist.

    Raises OSError for a source that cannot be read, ValueError, in one line, for one that holds something else.
    """
    present = set(ThroughputTable(table).everything())
    candidates: list[Measurement] = []
    for source in sources:
        rows = _rows([source])
        if not rows and source.stat().st_size:
            raise ValueError(f"{source}: no throughput table: none of its lines is a measurement")
        candidates += rows
    return sorted(dict.fromkeys(row for row in candidates if row not in present), key=lambda row: row.time)


def _rows(tables: Sequence[Path]) -> list[Measurement]:
    """Of several tables, each once. Raises OSError for a table that is not there."""
    measurements: dict[Measurement, None] = {}
    for table in tables:
        os.stat(table)  # to `ThroughputTable` a table that is not there is one without rows
        measurements |= dict.fromkeys(ThroughputTable(table).everything())
    return list(measurements)


def _open(tables: Sequence[Path]) -> "DuckDBPyConnection":
    """A database with the measurements as its table `rows`."""
    import duckdb  # 0.3 s, and wanted by few commands

    rows = _rows(tables)
    database = duckdb.connect(config={"threads": 1, "preserve_insertion_order": "true"})
    columns = ", ".join(f"{column} {kind}" for column, kind in ROW.items())
    database.execute(f"CREATE SEQUENCE place; CREATE TABLE rows ({columns}, id BIGINT DEFAULT nextval('place'))")
    if not rows:
        return database
    # Written anew, every field of every row: a line may leave out what is usual.
    with NamedTemporaryFile("w", encoding="utf-8", suffix=".jsonl") as file:
        file.writelines(row.model_dump_json() + "\n" for row in rows)
        file.flush()
        kinds = ", ".join(f"{column}: '{kind}'" for column, kind in ROW.items())
        database.execute(
            f"INSERT INTO rows ({', '.join(ROW)}) SELECT {', '.join(ROW)} "
            f"FROM read_json(?, format='newline_delimited', columns={{{kinds}}})",
            [file.name],
        )
    return database


def _records(database: "DuckDBPyConnection", statement: str) -> list[dict[str, Any]]:
    result = database.execute(statement)
    names = [column[0] for column in result.description or []]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _summary(record: dict[str, Any]) -> Summary:
    failed = record["failure"] is not None
    spread = None if failed else (record["within"] ** 2 + record["between_rows"] ** 2) ** 0.5
    values = {name: record[name] for name in ("fingerprint", "model", "configuration", "shard", "peak_bytes", "time")}
    values |= {
        "step_seconds": None if failed else record["step_seconds"],
        "spread_seconds": spread,
        "count": 0 if failed else record["steps"],
        "failure": record["failure"],
    }
    return Summary(Measurement.model_validate(values), record["rows"])


def _degrees(text: str) -> dict[str, Any]:
    """Columns and their values from a layout as people write it."""
    columns: dict[str, Any] = {}
    for part in re.split(r"[·,\s]+", text.lower().strip()):
        match = re.fullmatch(r"(tp|pp|vp|cp|ep|etp|dp|z|zero)=?(\d+)", part)
        if match:
            columns["zero" if match[1] == "z" else match[1]] = int(match[2])
        elif part in ("sp", "nosp"):
            columns["sequence_parallel"] = part == "sp"
        elif re.fullmatch(r"recompute[:=](none|selective|full)", part):
            columns["recompute"] = re.split(r"[:=]", part)[1]
        elif part:
            raise ValueError(
                f"layout {text}: {part!r} is no degree; expected such as TP2·PP1·DP4, SP, Z1, recompute:full"
            )
    return columns


def groups(summaries: Iterable[Summary]) -> dict[tuple[str, ...], list[Summary]]:
    """Summaries that can be compared with one another, by fingerprint; shards and steps apart."""
    result: dict[tuple[str, ...], list[Summary]] = {}
    for summary in summaries:
        key = (*summary.measurement.fingerprint.model_dump().values(), "shard" * summary.measurement.shard)
        result.setdefault(key, []).append(summary)
    return result
