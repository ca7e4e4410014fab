"""Published peaks, failures and activation figures, as the memory model takes them."""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.layout import Layout
from profiles.memory import Peaks
from profiles.model_shape import ModelShape
from profiles.published import recompute_kind, zero_stage

GIB = 2.0**30
INCONSISTENT = ("gbs!=", "tp*pp*cp*dp!=", "inconsistent")
"""Words in `quality` of rows that contradict themselves: nobody knows what ran."""


@dataclass(frozen=True)
class Row:
    """One published run or failure."""

    source: str
    """`source_id`: one framework on one machine."""
    sweep: str
    """`sweep_id`."""
    model: ModelShape
    """What ran."""
    configuration: Configuration
    """How."""
    precision: str
    """As published."""
    peak_bytes: float | None
    """Largest memory; tools that say GB here (torch.cuda, nvidia-smi) count binary ones."""
    memory_bytes: float | None
    """Of one accelerator, where `system` tells it."""
    failed: bool
    """Published as out of memory, or as crashed or out of memory."""


@dataclass
class Published:
    """What a folder holds."""

    rows: list[Row]
    """Those that can be used."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why others cannot, and how many."""


class UnusableError(ValueError):
    """A row that says too little, or contradicts itself."""


def read(folder: Path) -> Published:
    """Rows of `throughput.csv` and `failed_configs.csv`. Raises FileNotFoundError where the first is not there."""
    found = Published([])
    _read(folder / "throughput.csv", found, failed=False)
    if (folder / "failed_configs.csv").exists():
        _read(folder / "failed_configs.csv", found, failed=True)
    return found


def _read(path: Path, found: Published, *, failed: bool) -> None:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                found.rows.append(_row(row, failed))
            except UnusableError as reason:
                if failed or row.get("peak_mem_gb"):
                    found.skipped[f"{row['source_id']}: {reason}"] += 1


def _row(row: dict[str, str], failed: bool) -> Row:
    if any(word in row.get("quality", "") for word in INCONSISTENT):
        raise UnusableError("contradicts itself")
    shape = _model(row)
    peak = _number(row, "peak_mem_gb")
    return Row(
        source=row["source_id"],
        sweep=row["sweep_id"],
        model=shape,
        configuration=_configuration(row),
        precision=row["precision"] or "bf16",
        peak_bytes=peak * GIB if peak else None,
        memory_bytes=_memory(row["system"]),
        failed=failed,
    )


def _number(row: dict[str, str], name: str) -> float:
    """A figure; 0 where the cell is empty or the column is not there."""
    text = row.get(name) or "0"
    try:
        return float(text)
    except ValueError:
        raise UnusableError(f"{name} is no number") from None


def _whole(row: dict[str, str], name: str, otherwise: int = 0) -> int:
    return int(_number(row, name)) or otherwise


def _model(row: dict[str, str]) -> ModelShape:
    layers, hidden, seq_len, vocab = (_whole(row, name) for name in ("layers", "hidden", "seq_len", "vocab"))
    if not (layers and hidden and seq_len and vocab):
        raise UnusableError("no model shape")
    published = _whole(row, "heads")
    heads = _heads(hidden, published)
    try:
        return ModelShape(
            layers=layers,
            hidden=hidden,
            ffn_hidden=_whole(row, "ffn_hidden", 4 * hidden),
            heads=heads,
            kv_heads=_whole(row, "kv_heads", heads) if heads == published else heads,
            seq_len=seq_len,
            vocab=vocab,
            gated_mlp=row["gated_mlp"] == "yes",
            tied_embeddings=row["tied_embeddings"] == "yes",
        )
    except ValidationError as error:
        raise UnusableError("model shape is not possible") from error


def _heads(hidden: int, published: int) -> int:
    """As published where rotary positions allow it, else the possible number nearest to it, or to heads that are 128
    wide: without materialised scores memory hardly depends on it."""
    possible = [heads for heads in range(1, hidden // 2 + 1) if hidden % heads == 0 and hidden // heads % 2 == 0]
    return min(possible, key=lambda heads: abs(heads - (published or hidden / 128)))


def _configuration(row: dict[str, str]) -> Configuration:
    micro_batch = _whole(row, "mbs")
    if micro_batch < 1:
        raise UnusableError("no micro-batch")
    tp, pp, vp, cp, ep = (_whole(row, name, 1) for name in ("tp", "pp", "vp", "cp", "ep"))
    dp = _whole(row, "dp", max(_whole(row, "gpus") // (tp * pp * cp), 1))
    count = _whole(row, "grad_accum", max(_whole(row, "gbs") // (dp * micro_batch), 1))
    try:
        layout = Layout(
            **{"tp": tp, "pp": pp, "vp": vp if pp > 1 else 1, "cp": cp, "ep": ep, "dp": dp},
            sequence_parallel=row["sequence_parallel"] == "yes" and tp > 1,
            recompute=recompute_kind(row["recompute"]),
            zero=zero_stage(row["sharding"]),
        )
        return Configuration(layout=layout, micro_batch=micro_batch, global_batch=count * micro_batch * dp)
    except ValidationError as error:
        raise UnusableError("layout is not possible") from error


def _memory(system: str) -> float | None:
    """Bytes from `h100-sxm-80g`; None where the system's name does not say it."""
    found = re.search(r"\b(\d+)g\b", system.lower())
    return int(found[1]) * GIB if found else None


def peaks_of(rows: Iterable[Row]) -> list[Peaks]:
    """Rows as observations, in groups of a model and precision; the order within them is kept."""
    groups: dict[tuple[ModelShape, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.precision), []).append(row)
    return [
        Peaks(
            model,
            Configurations.of(row.configuration for row in found),
            precision,
            np.array([np.nan if row.failed else row.peak_bytes or np.nan for row in found]),
            np.array([row.memory_bytes or np.nan if row.failed else np.nan for row in found]),
        )
        for (model, precision), found in groups.items()
    ]
