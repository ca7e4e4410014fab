"""Does the memory model predict what others measured, and does it know what did not fit?

    python -m benchmarks.memory --data DIR [--quick] [--json]

DIR has throughput.csv (rows with peak_mem_gb), failed_configs.csv and activation_memory.csv, or the first of them. The
model is told nothing about who measured: before any row it takes every framework for plain PyTorch. Then it learns, for
each source, from a few rows that it chooses itself, and is judged on the others. Needs no accelerator; takes seconds.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from benchmarks.memory_activations import check
from benchmarks.memory_rows import Published, Row, peaks_of, read
from profiles.memory import PYTORCH, MemoryModel, Peaks
from profiles.memory.peaks import OUTSIDE_BYTES

SHARE, LEAST = 0.1, 4
"""Rows learned from: this share of a source's, but at least so many."""
FIGURES = ("median_error_pct", "p90_error_pct", "bias_pct", "coverage_pct")
COVERAGE = 0.8
"""Nominal share of the intervals."""


def predict(memory: MemoryModel, rows: list[Row]) -> dict[str, np.ndarray]:
    """Expected peak, interval and chance to fit of rows of any models: arrays in their order."""
    columns = {name: np.full(len(rows), np.nan) for name in ("peak", "low", "high", "chance")}
    for peaks, places in _grouped(rows):
        seen = memory.predict(peaks.model, peaks.configurations, peaks.precision, coverage=COVERAGE)
        columns["peak"][places], columns["low"][places], columns["high"][places] = seen.peak_bytes, seen.low, seen.high
        for place, chance in zip(places, _chances(seen, [rows[i].memory_bytes for i in places]), strict=True):
            columns["chance"][place] = chance
    return columns


def _chances(seen: Any, memories: list[float | None]) -> np.ndarray:
    by_memory = {memory: seen.chance_to_fit(memory) for memory in set(memories) if memory}
    return np.array([by_memory[memory][i] if memory else np.nan for i, memory in enumerate(memories)])


def _grouped(rows: list[Row]) -> list[tuple[Peaks, list[int]]]:
    """Rows by model and precision, with their places."""
    places: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault((row.model, row.precision), []).append(index)
    return list(zip(peaks_of(rows), places.values(), strict=True))


def choose(rows: list[Row], count: int) -> list[int]:
    """Places of rows that are spread evenly over the predicted peaks. Their own peaks are not looked at."""
    order = np.argsort(predict(MemoryModel(PYTORCH), rows)["peak"], kind="stable")
    return [int(order[int((index + 0.5) * len(rows) / count)]) for index in range(count)]


def judge(published: Published) -> list[dict[str, Any]]:
    """One entry a source: errors and coverage before and after learning, and what was said of failures."""
    entries = []
    for source in dict.fromkeys(row.source for row in published.rows):
        rows = [row for row in published.rows if row.source == source]
        measured = [row for row in rows if row.peak_bytes and not row.failed]
        runs = [row for row in rows if row.memory_bytes]
        # Failures can be told from successes only where both are published.
        runs = runs if any(row.failed for row in runs) else []
        if not measured and not runs:
            continue
        entry: dict[str, Any] = {"source": source, "zero_shot": _score(MemoryModel(PYTORCH), measured, runs)}
        count = max(LEAST, round(SHARE * len(measured)))
        if len(measured) > count:
            chosen = choose(measured, count)
            memory = MemoryModel(PYTORCH).fit(peaks_of(measured[index] for index in chosen))
            rest = [row for index, row in enumerate(measured) if index not in chosen]
            learned = {id(measured[index]) for index in chosen}
            entry["learned"] = _score(memory, rest, [row for row in runs if id(row) not in learned])
            entry["learned"]["learned_from"] = count
            entry["learned"]["implementation"] = memory.implementation.model_dump(mode="json")
        entries.append(entry)
    return entries


def _score(memory: MemoryModel, measured: list[Row], runs: list[Row]) -> dict[str, Any]:
    seen = predict(memory, measured)
    peaks = np.array([row.peak_bytes for row in measured], dtype=float)
    errors = 100 * (seen["peak"] / peaks - 1)
    inside = (seen["low"] <= peaks) & (peaks <= seen["high"])
    failed = np.array([row.failed for row in runs], dtype=bool)
    too_much = predict(memory, runs)["chance"] < 0.5
    return {
        "rows": len(measured),
        "errors_pct": errors.tolist(),
        "inside": inside.tolist(),
        "failures": {
            "true_positive": int((failed & too_much).sum()),
            "false_positive": int((~failed & too_much).sum()),
            "true_negative": int((~failed & ~too_much).sum()),
            "false_negative": int((failed & ~too_much).sum()),
        },
    }


def summary(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Several scores as one: every row counts once."""
    errors = np.concatenate([np.array(score["errors_pct"]) for score in scores]) if scores else np.array([])
    inside = np.concatenate([np.array(score["inside"], dtype=bool) for score in scores]) if scores else np.array([])
    failures = {name: sum(score["failures"][name] for score in scores) for name in scores[0]["failures"]}

    def of(values: np.ndarray, quantile: float) -> float | None:
        return float(np.quantile(values, quantile)) if len(values) else None

    return {
        "rows": len(errors),
        "median_error_pct": of(np.abs(errors), 0.5),
        "p90_error_pct": of(np.abs(errors), 0.9),
        "bias_pct": of(errors, 0.5),
        "coverage_pct": float(100 * inside.mean()) if len(inside) else None,
        "failures": failures,
    }


def run(folder: Path) -> dict[str, Any]:
    """Everything that the folder allows."""
    published = read(folder)
    entries = judge(published)
    activations = check(folder)
    scores = {kind: [entry[kind] for entry in entries if kind in entry] for kind in ("zero_shot", "learned")}
    whole = {kind: summary(score) if score else None for kind, score in scores.items()}
    zero_shot, learned = whole["zero_shot"], whole["learned"]
    sources = [
        {"source": entry["source"]}
        | {kind: summary([entry[kind]]) for kind in ("zero_shot", "learned") if kind in entry}
        | ({"learned_from": entry["learned"]["learned_from"]} if "learned" in entry else {})
        | ({"implementation": entry["learned"]["implementation"]} if "learned" in entry else {})
        for entry in entries
    ]
    return {
        "benchmark": "memory",
        "data": str(folder),
        "nominal_coverage_pct": 100 * COVERAGE,
        "outside_bytes": OUTSIDE_BYTES,
        "peak_rows": zero_shot["rows"] if zero_shot else 0,
        "peak_median_error_pct": zero_shot["median_error_pct"] if zero_shot else None,
        "peak_coverage_pct": zero_shot["coverage_pct"] if zero_shot else None,
        "learned_peak_median_error_pct": learned["median_error_pct"] if learned else None,
        "learned_peak_coverage_pct": learned["coverage_pct"] if learned else None,
        "failures": zero_shot["failures"] if zero_shot else None,
        "learned_failures": learned["failures"] if learned else None,
        "activation_max_error_pct": max(
            (abs(row["error_pct"]) for row in activations if "activation" in row["quantity"]), default=None
        ),
        "state_max_error_pct": max(
            (abs(row["error_pct"]) for row in activations if "activation" not in row["quantity"]), default=None
        ),
        "sources": sources,
        "activations": activations,
        "skipped": dict(published.skipped),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    table = Table(
        *("source", "learned from", "rows", "median error %", "90th pct", "bias %", "in 80 % interval"),
        *("said no, failed", "said no, ran", "said yes, ran", "said yes, failed"),
        title="peak memory: before any row, and after some",
    )
    total = {"source": "all"} | {
        kind: _sum(result["sources"], kind) for kind in ("zero_shot", "learned") if _sum(result["sources"], kind)
    }
    for entry in [*result["sources"], total]:
        for kind in ("zero_shot", "learned"):
            if kind not in entry:
                continue
            score = entry[kind]
            table.add_row(
                entry["source"] if kind == "zero_shot" else "",
                "nothing" if kind == "zero_shot" else f"{entry.get('learned_from', '')} rows",
                str(score["rows"]),
                *(
                    _figure(score.get(name))
                    for name in ("median_error_pct", "p90_error_pct", "bias_pct", "coverage_pct")
                ),
                *(str(score["failures"][name]) for name in score["failures"])
                if sum(score["failures"].values())
                else ("–",) * 4,
            )
    console.print(table)
    console.print(
        f"peak: median error {_figure(result['peak_median_error_pct'])} % before any row, "
        f"{_figure(result['learned_peak_median_error_pct'])} % after learning"
    )
    table = Table("model", "mode", "quantity", "published", "predicted", "error %", title="Korthikanti et al. 2022")
    for row in result["activations"]:
        table.add_row(
            *(row["model"], row["mode"], row["quantity"]),
            *(f"{row['published']:.2f} {row['units']}", f"{row['predicted']:.2f}", f"{row['error_pct']:+.2f}"),
        )
    if result["activations"]:
        console.print(table)
    for reason, count in result["skipped"].items():
        console.print(f"left out, {count} rows: {reason}")


def _sum(sources: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    scores = [entry[kind] for entry in sources if kind in entry]
    if not scores:
        return None
    return {
        "rows": sum(score["rows"] for score in scores),
        "failures": {name: sum(score["failures"][name] for score in scores) for name in scores[0]["failures"]},
    }


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("memory", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the published tables")
    parser.add_argument("--quick", action="store_true", help="the same: it is quick")
    options = parser.parse_args(arguments)
    if not (options.data / "throughput.csv").is_file():
        parser.error(f"--data {options.data}: no throughput.csv there")
    result = run(options.data)
    tell(result, show, options, console_of(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
