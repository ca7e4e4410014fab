"""Published peaks, failures and activation figures, as the memory model takes them."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.memory import Peaks
from profiles.model_shape import ModelShape
from profiles.published import RejectedError, configuration_of, csv_rows, model_of, number, whole
from profiles.published import Row as Cells

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


def read(folder: Path) -> Published:
    """Rows of `throughput.csv` and `failed_configs.csv`. Raises FileNotFoundError if the first is not there."""
    published = Published([])
    _read(folder / "throughput.csv", published, failed=False)
    if (folder / "failed_configs.csv").exists():
        _read(folder / "failed_configs.csv", published, failed=True)
    return published


def _read(path: Path, published: Published, *, failed: bool) -> None:
    for cells in csv_rows(path):
        try:
            published.rows.append(row_of(cells, failed))
        except RejectedError as reason:
            if failed or cells.get("peak_mem_gb"):
                published.skipped[f"{cells['source_id']}: {reason}"] += 1


def row_of(cells: Cells, failed: bool) -> Row:
    """A row of a file. Raises RejectedError."""
    if any(word in cells.get("quality", "") for word in INCONSISTENT):
        raise RejectedError("contradicts itself")
    filled = _filled(cells)
    peak = number(cells, "peak_mem_gb")
    return Row(
        source=cells["source_id"],
        sweep=cells["sweep_id"],
        model=model_of(filled),
        configuration=configuration_of(filled),
        precision=cells["precision"] or "bf16",
        peak_bytes=peak * GIB if peak else None,
        memory_bytes=_memory(cells["system"]),
        failed=failed,
    )


def _filled(cells: Cells) -> Cells:
    """With what memory hardly depends on: heads that are possible, the accelerators that the layout takes, and the
    global batch that follows from gradient accumulation, which is as published where the two disagree."""
    hidden, heads, micro_batch = whole(cells, "hidden"), whole(cells, "heads", 0), whole(cells, "mbs")
    possible = _heads(hidden, heads)
    split = whole(cells, "tp", 1) * whole(cells, "pp", 1) * whole(cells, "cp", 1)
    dp = whole(cells, "dp", max(whole(cells, "gpus", 0) // max(split, 1), 1))
    count = whole(cells, "grad_accum", max(whole(cells, "gbs", 0) // max(dp * micro_batch, 1), 1))
    return cells | {
        "ffn_hidden": cells["ffn_hidden"] or str(4 * hidden),
        "heads": str(possible),
        "kv_heads": cells["kv_heads"] if possible == heads else "",
        "gpus": str(split * dp),
        "dp": str(dp),
        "gbs": str(count * micro_batch * dp),
    }


def _heads(hidden: int, published: int) -> int:
    """As published where rotary positions allow it, else the possible number nearest to it, or to heads that are 128
    wide: without materialised scores memory hardly depends on it."""
    possible = [heads for heads in range(1, hidden // 2 + 1) if hidden % heads == 0 and hidden // heads % 2 == 0]
    return min(possible, key=lambda heads: abs(heads - (published or hidden / 128)), default=published)


def _memory(system: str) -> float | None:
    """Bytes from `h100-sxm-80g`; None if the system's name does not say it."""
    size = re.search(r"\b(\d+)g\b", system.lower())
    return int(size[1]) * GIB if size else None


def peaks_of(rows: Iterable[Row]) -> list[Peaks]:
    """Rows as observations, in groups of a model and precision; the order within them is kept."""
    groups: dict[tuple[ModelShape, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.precision), []).append(row)
    return [
        Peaks(
            model,
            Configurations.of(row.configuration for row in members),
            precision,
            np.array([np.nan if row.failed else row.peak_bytes or np.nan for row in members]),
            np.array([row.memory_bytes or np.nan if row.failed else np.nan for row in members]),
        )
        for (model, precision), members in groups.items()
    ]
