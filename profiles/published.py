"""Measurements of others from a CSV file: what `copus profile import` adds, and the `published` profiler.

A row is a step time, or the failure that came instead. docs/tables.md has the columns.
"""

import csv
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from profiles.configuration import Configuration
from profiles.hardware import name_hardware
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.model_shape import ModelShape
from profiles.profiler import Processes, Task

REQUIRED = ("gpus", "layers", "hidden", "heads", "seq_len", "vocab", "gbs", "mbs")
"""Columns that have to be there, besides `step_time_s` or `tokens_per_s_per_gpu` (failures have neither)."""

Row = dict[str, str]
"""Column → cell, without the blanks around it; empty if nothing is said."""


@dataclass
class Read:
    """What a file held."""

    measurements: list[Measurement] = field(default_factory=list)
    """In the order of the file."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Why rows were left out, and how many."""


class RejectedError(ValueError):
    """A row that says too little, or contradicts itself."""


def read_csv(path: Path) -> Read:
    """The rows of a CSV file as measurements. Raises as `csv_rows` does."""
    read = Read()
    when = min(path.stat().st_mtime, time.time())
    for row in csv_rows(path):
        try:
            read.measurements.append(_measurement(row, path, when))
        except RejectedError as reason:
            read.rejected[str(reason)] += 1
    return read


def csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV file, for the functions below. Raises OSError if it cannot be read, ValueError, in one line,
    where it is none or lacks columns."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            rows = csv.DictReader(file)
            missing = [name for name in REQUIRED if name not in (rows.fieldnames or [])]
            if missing:
                raise ValueError(f"{path}: no column {', '.join(missing)}")
            for row in rows:
                yield {name: (cell or "").strip() for name, cell in row.items() if name}
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not CSV: {error}") from None


class PublishedProfiler:
    """Looks configurations up in a CSV file, as if they had been measured here.

    Rows of the job's model, precision and number of accelerators count, whatever machine they are from. Options:
    `csv`, the file.
    """

    processes: Processes = "one"
    shards = False

    def __init__(self, task: Task) -> None:
        """Raises ValueError if there is no such file, or other options."""
        options = dict(task.config.options)
        path = options.pop("csv", None)
        if not isinstance(path, str) or options:
            raise ValueError(f"the published profiler takes `csv`, a file, and nothing else; got {task.config.options}")
        try:
            measurements = read_csv(Path(path).expanduser()).measurements
        except OSError as error:
            raise ValueError(f"csv({path}): {error.strerror}") from None
        self._task = task
        self._rows: dict[Configuration, list[Measurement]] = {}
        for row in measurements:
            accelerators = row.configuration.layout.accelerators
            same = (row.fingerprint.model, row.fingerprint.precision, accelerators) == (
                *(task.fingerprint.model, task.fingerprint.precision),
                task.cluster.accelerators,
            )
            if same:
                self._rows.setdefault(row.configuration, []).append(row)
        if not self._rows:
            raise ValueError(
                f"csv({path}): none of its {len(measurements)} usable rows is of this model in "
                f"{task.fingerprint.precision} on {task.cluster.accelerators} accelerators"
            )

    def measure(self, configuration: Configuration) -> Measurement | None:
        """The next row of that configuration; None if there is none left."""
        rows = self._rows.get(configuration)
        if not rows:
            return None
        return rows.pop(0).model_copy(update={"fingerprint": self._task.fingerprint, "time": time.time()})


def _measurement(row: Row, path: Path, when: float) -> Measurement:
    model, configuration = model_of(row), configuration_of(row)
    seconds = seconds_of(row, configuration, model)
    by_rate = _seconds_by_rate(row, configuration, model)
    if seconds and by_rate and not 0.9 < seconds / by_rate < 1.1:
        raise RejectedError("step_time_s and tokens_per_s_per_gpu contradict each other")
    peak = number(row, "peak_mem_gb")
    nodes, per_node = nodes_of(row, configuration.layout.accelerators)
    fingerprint = Fingerprint(
        model=model.digest,
        precision=row.get("precision") or "unknown",
        backend=row.get("backend") or row.get("source_id") or path.stem,
        hardware=name_hardware(row.get("system") or "unknown", nodes, per_node),
        software=row.get("software") or row.get("sweep_id") or "unknown",
    )
    try:
        return Measurement(
            fingerprint=fingerprint,
            model=model,
            configuration=configuration,
            step_seconds=seconds,
            spread_seconds=number(row, "spread_s") if seconds else None,
            count=whole(row, "steps", 1) if seconds else 0,
            peak_bytes=None if peak is None else int(peak * 1e9),
            failure=_failure(row) if seconds is None else None,
            time=when,
        )
    except ValidationError as error:
        raise RejectedError(f"measurement: {_told(error)}") from None


def model_of(row: Row) -> ModelShape:
    """The transformer of a row. Raises RejectedError."""
    gated = _yes(row, "gated_mlp")
    values = {name: whole(row, name) for name in ("layers", "hidden", "heads", "seq_len", "vocab")}
    if gated and not row.get("ffn_hidden"):
        raise RejectedError("ffn_hidden is empty, and a gated MLP has no usual width")
    try:
        return ModelShape(
            **values,
            ffn_hidden=whole(row, "ffn_hidden", 4 * values["hidden"]),
            kv_heads=whole(row, "kv_heads", values["heads"]),
            gated_mlp=gated,
            tied_embeddings=_yes(row, "tied_embeddings"),
            experts=whole(row, "experts", 0),
            experts_per_token=whole(row, "experts_per_token", 1),
        )
    except ValidationError as error:
        raise RejectedError(f"model: {_told(error)}") from None


def configuration_of(row: Row) -> Configuration:
    """How a row ran. Raises RejectedError."""
    gpus = whole(row, "gpus")
    degrees = {name: whole(row, name, 1) for name in ("tp", "pp", "vp", "cp", "ep")}
    if row.get("etp") and whole(row, "experts", 0):
        degrees["etp"] = whole(row, "etp")
    if min(degrees.values()) < 1:
        raise RejectedError("a degree of parallelism is below 1")
    split = degrees["tp"] * degrees["pp"] * degrees["cp"]
    dp = whole(row, "dp", max(1, gpus // split))
    if split * dp != gpus:
        raise RejectedError("tp × pp × cp × dp is not the number of gpus")
    sharding = row.get("sharding", "").lower()
    if "param offload" in sharding or re.search(r"\+ *offload", sharding):
        raise RejectedError("parameters are offloaded, or it is not said what is")
    words: dict[str, Any] = {
        "sequence_parallel": _yes(row, "sequence_parallel") and degrees["tp"] > 1,
        "recompute": _recompute(row.get("recompute", "")),
        "zero": _zero(sharding),
        "offload_optimizer": "optimizer offload" in sharding,
    }
    try:
        layout = Layout(**degrees | {"vp": degrees["vp"] if degrees["pp"] > 1 else 1}, dp=dp, **words)
        return Configuration(layout=layout, micro_batch=whole(row, "mbs"), global_batch=whole(row, "gbs"))
    except ValidationError as error:
        raise RejectedError(f"configuration: {_told(error)}") from None


def _yes(row: Row, name: str) -> bool:
    """A cell that says yes or no, in any case; empty is no. Raises RejectedError."""
    word = row.get(name, "").lower()
    if word not in ("yes", "true", "1", "no", "false", "0", ""):
        raise RejectedError(f"{name} is neither yes nor no")
    return word in ("yes", "true", "1")


def _recompute(recompute: str) -> Literal["none", "selective", "full"]:
    """What the column `recompute` says; `selective (op)` is selective, and nothing is none."""
    recompute = recompute.lower()
    return "selective" if "selective" in recompute else "full" if "full" in recompute else "none"


def _zero(sharding: str) -> int:
    """What the column `sharding` says: `zero0` … `zero3`; names with `fsdp` are stage 3, other distributed optimizers
    stage 1."""
    stage = re.search(r"zero-?([0-3])", sharding)
    if stage:
        return int(stage[1])
    distributed = re.search(r"dist\w*-?optim", sharding)
    return 1 if distributed else 3 if re.search(r"fsdp|hsdp", sharding) else 0


def seconds_of(row: Row, configuration: Configuration, model: ModelShape) -> float | None:
    """Duration of its step, seconds; None if the row says no time. Raises RejectedError."""
    seconds = number(row, "step_time_s")
    if seconds is None:
        seconds = _seconds_by_rate(row, configuration, model)
    if seconds is not None and seconds <= 0:
        raise RejectedError("the time is not positive")
    return seconds


def _seconds_by_rate(row: Row, configuration: Configuration, model: ModelShape) -> float | None:
    """Duration of its step by the tokens that an accelerator does in a second; None if the row does not say."""
    rate = number(row, "tokens_per_s_per_gpu")
    tokens = configuration.global_batch * model.seq_len
    return tokens / (rate * configuration.layout.accelerators) if rate else None


def nodes_of(row: Row, usual: int) -> tuple[int, int]:
    """Nodes of a row, and accelerators of each, of which there are `usual` or all where it does not say. Raises
    RejectedError."""
    accelerators = whole(row, "gpus")
    per_node = min(whole(row, "gpus_per_node", usual), accelerators)
    if per_node < 1 or accelerators % per_node:
        raise RejectedError("gpus do not fill the nodes")
    return accelerators // per_node, per_node


def _failure(row: Row) -> str:
    if row.get("failure"):
        return row["failure"]
    said = " ".join(row.get(name, "") for name in ("notes", "quality")).lower()
    if "crash" in said:
        return "crashed, or out of memory"
    if re.search(r"\boom\b|out of memory", said):
        return "out of memory"
    raise RejectedError("neither a time nor a failure")


def number(row: Row, name: str) -> float | None:
    """A cell; None if it is empty. Raises RejectedError."""
    text = row.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RejectedError(f"{name} is not a number")
    return value


def whole(row: Row, name: str, default: int | None = None) -> int:
    """A cell; `default` where it is empty, RejectedError where there is none."""
    value = number(row, name)
    if value is None:
        if default is None:
            raise RejectedError(f"{name} is empty")
        return default
    if not value.is_integer():
        raise RejectedError(f"{name} is not whole")
    return int(value)


def _told(error: ValidationError) -> str:
    """What is wrong, without the numbers of this row: rows are counted by it."""
    message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
    return re.sub(r"\(-?[\d.]+\)|\s*= [\d.e+-]+", "", message)
