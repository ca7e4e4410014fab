"""How well does the cost model predict published step times, from a tenth of a sweep's rows and from none?

    python -m benchmarks.throughput --data DIR [--quick] [--json]

DIR has a `throughput.csv` (columns: docs/cost-model.md). A sweep is the rows with the same sweep_id, model, cluster and
precision. Rows that their own publication flags as unreliable, or that reach less than 15 % of the peak, are not
scored; the column `all` counts them in.
"""

import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from benchmarks.published import Published, Sweep, read
from profiles.cost import CostModel, Timings
from profiles.cost.accelerator import accelerator
from profiles.cost.residual import coordinates
from profiles.cost.select import select

SHARE = 0.1
"""Of a sweep's rows, measured for the fit."""
LEAST = 4
"""Rows that are measured at least; a sweep needs one more to be scored with a fit."""
COVERAGE = 0.8
"""Share of the times that an interval is meant to hold."""
NAIVE_MFU = 0.4
"""What the roofline baseline takes for granted before it has seen a row."""
TARGETS = {"one node": 8.0, "several nodes": 10.0}
"""Mean absolute percentage errors to reach with a fit."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """Of one way to predict."""

    errors: Floats
    """Predicted ÷ measured, less 1, of the rows that were not measured for the fit."""
    covered: NDArray[np.bool_]
    """Whether the measured time of those rows lies in the interval."""
    regrets: Floats
    """For each global batch: measured time of the layout predicted fastest, over the fastest, less 1."""


def mape(score: Score | None) -> float | None:
    """Mean absolute percentage error."""
    return None if score is None or not len(score.errors) else float(100 * np.abs(score.errors).mean())


def regret(score: Score | None) -> float | None:
    """Mean over global batches, in percent."""
    return None if score is None or not len(score.regrets) else float(100 * score.regrets.mean())


def coverage(score: Score | None) -> float | None:
    """In percent."""
    return None if score is None or not len(score.covered) else float(100 * score.covered.mean())


def regrets(seconds: Floats, timings: Timings) -> Floats:
    """For each global batch with a choice. Rows of one configuration are repeats: their median counts."""
    c = timings.configurations
    columns = np.stack([getattr(c, field.name).astype(float) for field in fields(c)])
    _, which = np.unique(columns, axis=1, return_inverse=True)
    measured = np.array([np.median(timings.step_seconds[which == index]) for index in which.ravel()])
    found = []
    for batch in np.unique(c.global_batch):
        same = np.flatnonzero(c.global_batch == batch)
        if len(np.unique(which.ravel()[same])) > 1:
            found.append(measured[same][np.argmin(seconds[same])] / measured[same].min() - 1)
    return np.array(found)


def with_rows(cost: CostModel, timings: Timings, count: int) -> tuple[Score, NDArray[np.int64]]:
    """Select, fit, predict the rest."""
    t = timings
    chosen = (
        select(cost, t.model, t.cluster, t.configurations, t.precision, count)
        if count
        else np.array([], dtype=np.int64)
    )
    fitted = cost.fit([t.take(chosen)])
    predicted = fitted.predict(t.model, t.cluster, t.configurations, t.precision, coverage=COVERAGE)
    rest = np.setdiff1d(np.arange(len(t.step_seconds)), chosen)
    inside = (predicted.low <= t.step_seconds) & (t.step_seconds <= predicted.high)
    return Score(
        errors=(predicted.seconds / t.step_seconds - 1)[rest],
        covered=inside[rest],
        regrets=regrets(predicted.seconds, t),
    ), chosen


def nearest(timings: Timings, chosen: NDArray[np.int64]) -> Floats:
    """First baseline: the time of a sequence of the nearest measured row (log2 of degrees and batches)."""
    c = timings.configurations
    places = coordinates(timings.model, timings.cluster, c)
    distance = ((places[:, None, :] - places[None, chosen, :]) ** 2).sum(2)
    near = chosen[np.argmin(distance, axis=1)]
    return timings.step_seconds[near] * c.global_batch / c.global_batch[near]


def roofline(timings: Timings, chosen: NDArray[np.int64]) -> Floats:
    """Second baseline: operations of the model ÷ (peak × one utilization), which is fitted where there are rows."""
    t, model = timings, timings.model
    tokens = t.configurations.global_batch * float(model.seq_len)
    per_token = 6 * model.parameters + 6 * model.layers * model.hidden * model.seq_len
    peak = accelerator(t.cluster.accelerator).peak(t.precision) * t.configurations.accelerators
    ideal = tokens * per_token / peak
    if not len(chosen):
        return ideal / NAIVE_MFU
    return ideal * np.exp(np.median(np.log(t.step_seconds[chosen] / ideal[chosen])))


def _percent(seconds: Floats, timings: Timings, chosen: NDArray[np.int64]) -> float:
    rest = np.setdiff1d(np.arange(len(timings.step_seconds)), chosen)
    return float(100 * np.abs(seconds / timings.step_seconds - 1)[rest].mean())


def score(sweep: Sweep, cost: CostModel) -> dict[str, Any] | None:
    """One line of the table; None where no row is reliable."""
    t = sweep.timings.take(sweep.scored)
    size = len(t.step_seconds)
    if not size:
        return None
    count = max(LEAST, math.ceil(SHARE * size))
    none, nothing = with_rows(cost, t, 0)
    fit, chosen = with_rows(cost, t, count) if size > count else (None, nothing)
    everything = sweep.timings
    all_count = max(LEAST, math.ceil(SHARE * len(everything.step_seconds)))
    every = with_rows(cost, everything, all_count)[0] if len(everything.step_seconds) > all_count else None
    return {
        "sweep_id": sweep.sweep_id,
        "source_id": sweep.source_id,
        "model_parameters": t.model.parameters,
        "accelerator": t.cluster.accelerator,
        "precision": t.precision,
        "nodes": t.cluster.nodes,
        "accelerators": t.cluster.accelerators,
        "rows": size,
        "fitted_rows": len(chosen),
        "mape_pct": mape(fit),
        "regret_pct": regret(fit),
        "coverage_pct": coverage(fit),
        "zero_shot_mape_pct": mape(none),
        "zero_shot_regret_pct": regret(none),
        "zero_shot_coverage_pct": coverage(none),
        "nearest_mape_pct": _percent(nearest(t, chosen), t, chosen) if fit else None,
        "roofline_mape_pct": _percent(roofline(t, chosen), t, chosen) if fit else None,
        "zero_shot_roofline_mape_pct": _percent(roofline(t, nothing), t, nothing),
        "rows_with_unreliable": len(everything.step_seconds),
        "mape_with_unreliable_pct": mape(every),
    }


def _mean(lines: list[dict[str, Any]], key: str, weight: str | None = None) -> float | None:
    kept = [line for line in lines if line[key] is not None]
    if not kept:
        return None
    weights = [
        line["rows"] - line["fitted_rows"] if weight == "rest" else line[weight] if weight else 1.0 for line in kept
    ]
    return float(np.average([line[key] for line in kept], weights=weights))


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over sweeps, coverage over rows."""
    keys = (
        "mape_pct",
        "regret_pct",
        "zero_shot_mape_pct",
        "zero_shot_regret_pct",
        "nearest_mape_pct",
        "roofline_mape_pct",
    )
    means = {key: _mean(lines, key) for key in (*keys, "zero_shot_roofline_mape_pct")}
    means["coverage_pct"] = _mean(lines, "coverage_pct", "rest")
    means["zero_shot_coverage_pct"] = _mean(lines, "zero_shot_coverage_pct", "rows")
    for key in ("mape_pct", "regret_pct", "zero_shot_mape_pct", "zero_shot_regret_pct"):
        kept = [line[key] for line in lines if line[key] is not None]
        means[f"median_{key}"] = float(np.median(kept)) if kept else None
    fitted = [line for line in lines if line["mape_pct"] is not None]
    within = [line["mape_pct"] <= TARGETS["one node" if line["nodes"] == 1 else "several nodes"] for line in fitted]
    chosen = [line for line in lines if line["regret_pct"] is not None]
    blind = [line for line in lines if line["zero_shot_regret_pct"] is not None]
    return means | {
        "sweeps": len(lines),
        "fitted_sweeps": len(fitted),
        "mape_within_target": sum(within),
        "regret_within_target": sum(line["regret_pct"] <= 2 for line in chosen),
        "regret_sweeps": len(chosen),
        "zero_shot_mape_within_target": sum(line["zero_shot_mape_pct"] <= 25 for line in lines),
        "zero_shot_regret_within_target": sum(line["zero_shot_regret_pct"] <= 5 for line in blind),
        "zero_shot_regret_sweeps": len(blind),
        "nominal_coverage_pct": 100 * COVERAGE,
    }


def run(published: Published, quick: bool = False, cost: CostModel | None = None) -> dict[str, Any]:
    """All sweeps; `quick` takes every fifth."""
    sweeps = published.sweeps[::5] if quick else published.sweeps
    lines = [line for sweep in sweeps if (line := score(sweep, cost or CostModel()))]
    one, several = ([line for line in lines if (line["nodes"] == 1) == single] for single in (True, False))
    sources = dict.fromkeys(line["source_id"] for line in lines)
    return {
        "benchmark": "throughput",
        "quick": quick,
        "file_rows": published.rows,
        "skipped": dict(published.skipped),
        "sweeps": lines,
        "summary": {"one node": summary(one), "several nodes": summary(several), "all": summary(lines)},
        "sources": {source: summary([line for line in lines if line["source_id"] == source]) for source in sources},
    }


COLUMNS = {
    "nodes": "nodes",
    "rows": "rows",
    "fitted_rows": "fit",
    "mape_pct": "MAPE",
    "regret_pct": "regret",
    "coverage_pct": "cover",
    "nearest_mape_pct": "nearest",
    "roofline_mape_pct": "roofline",
    "zero_shot_mape_pct": "0: MAPE",
    "zero_shot_regret_pct": "0: regret",
    "zero_shot_coverage_pct": "0: cover",
    "zero_shot_roofline_mape_pct": "0: roofline",
    "mape_with_unreliable_pct": "all: MAPE",
}


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    table = Table(
        "sweep", *COLUMNS.values(), title="percent; `0:` without any row; `all:` with rows that are not scored"
    )
    for line in result["sweeps"]:
        name = f"{line['sweep_id']} {line['precision']}"
        table.add_row(name, *(_cell(line[key]) for key in COLUMNS))
    console.print(table)
    for title, groups in (("sources", result["sources"]), ("summary", result["summary"])):
        table = Table(title, "sweeps", *list(COLUMNS.values())[3:12], title="means over sweeps; coverage over rows")
        for name, line in groups.items():
            table.add_row(name, str(line["sweeps"]), *(_cell(line[key]) for key in list(COLUMNS)[3:12]))
        console.print(table)
    for name, line in result["summary"].items():
        console.print(
            f"{name}: MAPE within {TARGETS.get(name, '8 or 10')} % in {line['mape_within_target']} of "
            f"{line['fitted_sweeps']} sweeps, regret within 2 % in {line['regret_within_target']} of "
            f"{line['regret_sweeps']}; with no row MAPE within 25 % in {line['zero_shot_mape_within_target']} of "
            f"{line['sweeps']}, regret within 5 % in {line['zero_shot_regret_within_target']} of "
            f"{line['zero_shot_regret_sweeps']}. Medians: MAPE {_cell(line['median_mape_pct'])}, regret "
            f"{_cell(line['median_regret_pct'])}; with no row {_cell(line['median_zero_shot_mape_pct'])} and "
            f"{_cell(line['median_zero_shot_regret_pct'])}"
        )
    console.print(f"rows of the file: {result['file_rows']}; not usable: {result['skipped']}")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("throughput", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with throughput.csv")
    parser.add_argument("--quick", action="store_true", help="every fifth sweep")
    options = parser.parse_args(arguments)
    if not (options.data / "throughput.csv").is_file():
        parser.error(f"--data: {options.data / 'throughput.csv'} is not there")
    result = run(read(options.data), options.quick)
    tell(result, show, options, console_of(options, width=200))
    return 0


if __name__ == "__main__":
    sys.exit(main())
