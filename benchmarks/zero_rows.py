"""Do memory and cost model predict what others measured with ZeRO and FSDP?

    python -m benchmarks.zero_rows --data DIR [--json]

DIR has `zero_rows.csv`: published runs of DeepSpeed's ZeRO and of FSDP, some with the optimizer offloaded. The memory
model is told which of the two ran, as the backends' descriptions tell it, and has seen no row of the file. What the
cost model knows of software stacks was learned from these rows too: `benchmarks.throughput` leaves each source out.
Needs no accelerator; takes seconds.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from benchmarks.memory_rows import Row, row_of
from benchmarks.published import read
from copus.backends.registry import find_backend
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.memory import MemoryModel
from profiles.published import RejectedError, csv_rows

NAME = "zero_rows.csv"
UNSURE = ("recompute-not-stated", "micro-batch-uncertain", "shape-not-stated")
"""Words in `quality` of rows whose memory nobody can work out."""
COVERAGE = 0.8
"""Nominal share of the intervals."""


def framework_of(sharding: str) -> str | None:
    """The backend that runs what the column `sharding` says; None for other frameworks."""
    words = sharding.lower()
    if words.startswith("fsdp"):
        return "fsdp"
    return "deepspeed" if words.startswith("zero") else None


def kind_of(configuration: Configuration) -> str:
    """Rows of one kind are summed up together."""
    layout = configuration.layout
    return f"ZeRO {layout.zero}" + (", offloaded" if layout.offload_optimizer else "")


def memory_rows(path: Path) -> list[dict[str, Any]]:
    """Predicted and published peaks."""
    peaks = []
    for cells in csv_rows(path):
        framework = framework_of(cells["sharding"])
        try:
            row = row_of(cells, failed=False)
        except RejectedError:
            continue
        layout = row.configuration.layout
        # No backend here shares out over context parallel ranks, or recomputes chosen operations of a layer.
        is_ours = layout.pp == layout.cp == 1 and "(op)" not in cells["recompute"]
        if framework is not None and row.peak_bytes and is_ours and not any(w in cells["quality"] for w in UNSURE):
            peaks.append({"framework": framework, "kind": kind_of(row.configuration), **_peak(framework, row)})
    return peaks


def _peak(framework: str, row: Row) -> dict[str, Any]:
    memory = MemoryModel(find_backend(framework).implementation(dropout=False))
    seen = memory.predict(row.model, Configurations.of([row.configuration]), row.precision, coverage=COVERAGE)
    assert row.peak_bytes is not None, "only such rows are asked for"
    return {
        "source": row.source,
        "configuration": row.configuration.label,
        "published": row.peak_bytes,
        "predicted": float(seen.peak_bytes[0]),
        "inside": bool(seen.low[0] <= row.peak_bytes <= seen.high[0]),
    }


def time_rows(folder: Path) -> list[dict[str, Any]]:
    """Predicted and published step times of the rows that can be scored."""
    times = []
    for sweep in read(folder, NAME).sweeps:
        timings = sweep.timings.take(sweep.scored)
        seen = sweep.cost_model().predict(
            timings.model, timings.cluster, timings.configurations, timings.precision, coverage=COVERAGE
        )
        for index, seconds in enumerate(timings.step_seconds):
            configuration = timings.configurations[index]
            times.append(
                {
                    "framework": "all",
                    "kind": kind_of(configuration),
                    "source": sweep.source_id,
                    "configuration": configuration.label,
                    "published": float(seconds),
                    "predicted": float(seen.seconds[index]),
                    "inside": bool(seen.low[index] <= seconds <= seen.high[index]),
                }
            )
    return times


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By framework and kind: how many, how far off in the median, to which side, and how many in their intervals."""
    groups = []
    for framework, kind in sorted({(row["framework"], row["kind"]) for row in rows}):
        same = [row for row in rows if (row["framework"], row["kind"]) == (framework, kind)]
        errors = np.array([100 * (row["predicted"] / row["published"] - 1) for row in same])
        groups.append(
            {
                "framework": framework,
                "kind": kind,
                "rows": len(same),
                "median_error_pct": float(np.median(np.abs(errors))),
                "bias_pct": float(np.median(errors)),
                "inside_pct": 100 * float(np.mean([row["inside"] for row in same])),
            }
        )
    return groups


def run(folder: Path) -> dict[str, Any]:
    """Both models against the file."""
    memory, times = memory_rows(folder / NAME), time_rows(folder)
    return {
        "benchmark": "zero_rows",
        "data": str(folder),
        "memory": summary(memory),
        "seconds": summary(times),
        "rows": {"memory": memory, "seconds": times},
    }


def show(result: dict[str, Any], console: Console) -> None:
    """A table for each model."""
    for name, title in (("memory", "peak memory"), ("seconds", "step time")):
        table = Table(title=f"{title}, before any row")
        for column in ("framework", "kind", "rows", "median error", "bias", f"in {COVERAGE:.0%} intervals"):
            table.add_column(column, justify="left" if column in ("framework", "kind") else "right")
        for one in result[name]:
            figures = (f"{one[key]:+.0f} %" if key == "bias_pct" else f"{one[key]:.0f} %" for key in FIGURES)
            table.add_row(one["framework"], one["kind"], str(one["rows"]), *figures)
        console.print(table)


FIGURES = ("median_error_pct", "bias_pct", "inside_pct")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("zero_rows", __doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {NAME}")
    options = parser.parse_args(arguments)
    tell(run(options.data), show, options, console_of(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
