"""How well does the cost model predict published step times, from a tenth of a sweep's rows and from none?

    python -m benchmarks.throughput --data DIR [--in-use] [--quick] [--json]

DIR has a `throughput.csv` (columns: docs/cost-model.md), and may have a `moe_rows.csv` and a `zero_rows.csv`. A sweep
is the rows with the same sweep_id, model, cluster, precision and software. Rows that their own publication flags as
unreliable, or that reach less than 15 % of the peak, are not scored; the column `all` counts them in.

What published runs say of the constants is learned anew for each sweep, without its source and without those that
repeat its runs (`benchmarks.throughput_priors`); `known:` are the errors of the constants in use, which know it.
`--in-use` judges these alone.

The rows of a fit are chosen one after the other, as a profiler chooses them (`next_to_measure`); the errors are of the
others. Regret is what the choice costs that the planner would make: for each global batch the least time, where rows of
the fit keep the time that was measured, the others have the predicted one, and what was not measured and has a chance
below 80 % to fit into the memory is left out. That chance is the memory model's before any row, for plain PyTorch as in
benchmarks.memory: published peaks and failures are not looked at. The baselines know the same rows and chances.
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
from benchmarks.published import Published, Sweep, read_all
from benchmarks.published_sources import family_of
from benchmarks.throughput_priors import Tuner
from planner.memory_check import LIKELY
from profiles.accelerator import accelerator, memory_bytes
from profiles.configurations import Configurations
from profiles.cost import CostModel, Timings
from profiles.cost.effects import Effects, precision_family
from profiles.cost.residual import coordinates
from profiles.cost.select import next_to_measure, select
from profiles.memory import PYTORCH, MemoryModel
from profiles.mfu import flops_per_token

SHARE = 0.1
"""Of a sweep's rows, measured for the fit."""
LEAST = 4
"""Rows that are measured at least; a sweep needs one more to be scored with a fit."""
COVERAGE = 0.8
"""Share of the times that an interval is meant to hold."""
NAIVE_MFU = 0.4
"""What the roofline baseline takes for granted before it has seen a row."""
BASELINES = ("nearest_mape_pct", "nearest_regret_pct", "roofline_mape_pct", "roofline_regret_pct")
"""Scores of those that do without the cost model; none where nothing is fitted."""
TARGETS = {"one node": 8.0, "several nodes": 10.0}
"""Mean absolute percentage errors to reach with a fit."""

MANY_ROWS = 5
"""Scored rows from which on a source is more than an anecdote."""
EQUAL = 1e-9
"""Share of a step by which two are equally fast."""

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
"""Places of rows in a sweep."""


@dataclass(frozen=True)
class Score:
    """Of one way to predict."""

    errors: Floats
    """Predicted ÷ measured, less 1, of the rows that were not measured for the fit."""
    covered: NDArray[np.bool_]
    """Whether the measured time of those rows lies in the interval."""
    regrets: Floats
    """For each global batch: measured time of what is chosen, over the fastest, less 1."""


def mape(score: Score | None) -> float | None:
    """Mean absolute percentage error."""
    return None if score is None or not len(score.errors) else float(100 * np.abs(score.errors).mean())


def regret(score: Score | None) -> float | None:
    """Mean over global batches, in percent."""
    return None if score is None or not len(score.regrets) else float(100 * score.regrets.mean())


def coverage(score: Score | None) -> float | None:
    """In percent."""
    return None if score is None or not len(score.covered) else float(100 * score.covered.mean())


def same(c: Configurations) -> NDArray[np.int64]:
    """A number for each configuration; repeats have the same."""
    columns = np.stack([getattr(c, field.name).astype(float) for field in fields(c)])
    return np.unique(columns, axis=1, return_inverse=True)[1].ravel()


def seconds_of(timings: Timings, rows: Rows) -> Floats:
    """What these rows say of each configuration: the median where they are repeats, nan where they are silent."""
    which, medians = same(timings.configurations), np.full(len(timings.step_seconds), np.nan)
    for group in np.unique(which[rows]):
        medians[which == group] = np.median(timings.step_seconds[rows[which[rows] == group]])
    return medians


def likely(timings: Timings) -> NDArray[np.bool_]:
    """Whether each configuration may be chosen unmeasured: the memory model, which has seen nothing, lets it."""
    t, room = timings, memory_bytes(timings.cluster)
    if room is None:
        return np.ones(len(t.step_seconds), dtype=bool)
    return MemoryModel(PYTORCH).predict(t.model, t.configurations, t.precision).chance_to_fit(room) >= LIKELY


def regrets(
    seconds: Floats, timings: Timings, measured: Floats | None = None, may: NDArray[np.bool_] | None = None
) -> Floats:
    """For each global batch with a choice. Rows of one configuration are repeats: their median counts.

    `measured` times (nan elsewhere) count instead of predicted `seconds`, and those configurations or `may` are chosen
    from; from all where there are none. Among equals the measured ones, else all of them, share the choice.
    """
    c, truth = timings.configurations, seconds_of(timings, np.arange(len(timings.step_seconds)))
    timed = np.zeros(len(c), dtype=bool) if measured is None else np.isfinite(measured)
    expected = seconds if measured is None else np.where(timed, measured, seconds)
    able = np.ones(len(c), dtype=bool) if may is None else timed | may
    which, regret = same(c), []
    for batch in np.unique(c.global_batch):
        rows = np.flatnonzero(c.global_batch == batch)
        if len(np.unique(which[rows])) < 2:
            continue
        open_ = rows[able[rows]] if able[rows].any() else rows
        best = open_[expected[open_] <= expected[open_].min() * (1 + EQUAL)]
        best = best[timed[best]] if timed[best].any() else best
        regret.append(truth[best].mean() / truth[rows].min() - 1)
    return np.array(regret)


def measure(cost: CostModel, timings: Timings, count: int, may: NDArray[np.bool_]) -> tuple[CostModel, Rows]:
    """Choose that many rows one after the other, and fit to them. Repeats are measured where nothing else is left."""
    t, chosen = timings, np.array([], dtype=np.int64)
    fitted = cost.fit([])
    for left in range(count, 0, -1):
        task = fitted, t.model, t.cluster, t.configurations, t.precision
        place = next_to_measure(*task, seconds_of(t, chosen), left, may)
        chosen = np.append(chosen, place if place >= 0 else select(*task, 1, leave_out=chosen))
        fitted = cost.fit([t.take(chosen)])
    return fitted, chosen


def with_rows(cost: CostModel, timings: Timings, count: int) -> tuple[Score, Rows]:
    """Select, fit, predict the rest."""
    may = likely(timings)
    fitted, chosen = measure(cost, timings, count, may)
    return judge(fitted, timings, chosen, may), chosen


def judge(fitted: CostModel, timings: Timings, chosen: Rows, may: NDArray[np.bool_]) -> Score:
    """How a model that knows the chosen rows predicts the rest."""
    t = timings
    predicted = fitted.predict(t.model, t.cluster, t.configurations, t.precision, coverage=COVERAGE)
    rest = np.setdiff1d(np.arange(len(t.step_seconds)), chosen)
    inside = (predicted.low <= t.step_seconds) & (t.step_seconds <= predicted.high)
    return Score(
        errors=(predicted.seconds / t.step_seconds - 1)[rest],
        covered=inside[rest],
        regrets=regrets(predicted.seconds, t, seconds_of(t, chosen), may),
    )


def nearest(timings: Timings, chosen: Rows) -> Floats:
    """First baseline: the time of a sequence of the nearest measured row (log2 of degrees and batches)."""
    c = timings.configurations
    places = coordinates(timings.model, timings.cluster, c)
    distance = ((places[:, None, :] - places[None, chosen, :]) ** 2).sum(2)
    near = chosen[np.argmin(distance, axis=1)]
    return timings.step_seconds[near] * c.global_batch / c.global_batch[near]


def roofline(timings: Timings, chosen: Rows) -> Floats:
    """Second baseline: operations of the model ÷ (peak × one utilization), which is fitted where there are rows."""
    t, model = timings, timings.model
    tokens = t.configurations.global_batch * float(model.seq_len)
    peak = accelerator(t.cluster.accelerator).peak(t.precision) * t.configurations.accelerators
    ideal = tokens * flops_per_token(model) / peak
    if not len(chosen):
        return ideal / NAIVE_MFU
    return ideal * np.exp(np.median(np.log(t.step_seconds[chosen] / ideal[chosen])))


def naive(name: str, seconds: Floats, timings: Timings, chosen: Rows) -> dict[str, float | None]:
    """The scores of a baseline that knows the same rows."""
    rest = np.setdiff1d(np.arange(len(timings.step_seconds)), chosen)
    lost = regrets(seconds, timings, seconds_of(timings, chosen), likely(timings))
    return {
        f"{name}_mape_pct": float(100 * np.abs(seconds / timings.step_seconds - 1)[rest].mean()),
        f"{name}_regret_pct": float(100 * lost.mean()) if len(lost) else None,
    }


def score(sweep: Sweep, cost: CostModel) -> dict[str, Any] | None:
    """One line of the table; None where no row is reliable."""
    t = sweep.timings.take(sweep.scored)
    size = len(t.step_seconds)
    if not size:
        return None
    count = max(LEAST, math.ceil(SHARE * size))
    none, nothing = with_rows(cost, t, 0)
    known = judge(sweep.cost_model(), t, nothing, likely(t))
    fit, chosen = with_rows(cost, t, count) if size > count else (None, nothing)
    everything = sweep.timings
    all_count = max(LEAST, math.ceil(SHARE * len(everything.step_seconds)))
    every = with_rows(cost, everything, all_count)[0] if len(everything.step_seconds) > all_count else None
    return {
        "sweep_id": sweep.sweep_id,
        "source_id": sweep.source_id,
        "kind": sweep.kind,
        "stack": sweep.stack,
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
        "known_mape_pct": mape(known),
        "known_regret_pct": regret(known),
        **dict.fromkeys(BASELINES),
        **(naive("nearest", nearest(t, chosen), t, chosen) if fit else {}),
        **(naive("roofline", roofline(t, chosen), t, chosen) if fit else {}),
        **naive("zero_shot_roofline", roofline(t, nothing), t, nothing),
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
        "known_mape_pct",
        "known_regret_pct",
        *BASELINES,
        "zero_shot_roofline_mape_pct",
        "zero_shot_roofline_regret_pct",
    )
    means = {key: _mean(lines, key) for key in keys}
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
        "rows": sum(line["rows"] for line in lines),
        "fitted_sweeps": len(fitted),
        "mape_within_target": sum(within),
        "regret_within_target": sum(line["regret_pct"] <= 2 for line in chosen),
        "regret_sweeps": len(chosen),
        "zero_shot_mape_within_target": sum(line["zero_shot_mape_pct"] <= 25 for line in lines),
        "zero_shot_regret_within_target": sum(line["zero_shot_regret_pct"] <= 5 for line in blind),
        "zero_shot_regret_sweeps": len(blind),
        "nominal_coverage_pct": 100 * COVERAGE,
    }


def run(published: Published, quick: bool = False, in_use: bool = False) -> dict[str, Any]:
    """All sweeps; `quick` takes every fifth. Without `in_use` each is judged by what all other sources say."""
    sweeps = published.sweeps[::5] if quick else published.sweeps
    others = {} if in_use else without_each_family(published.sweeps)
    lines = [
        line for sweep in sweeps if (line := score(sweep, sweep.cost_model(others.get(family_of(sweep.source_id)))))
    ]
    dense = [line for line in lines if line["kind"] == "dense"]
    one, several = ([line for line in dense if (line["nodes"] == 1) == single] for single in (True, False))
    experts, zero = ([line for line in lines if line["kind"] == kind] for kind in ("experts", "zero"))
    groups = {"one node": one, "several nodes": several, "all dense": dense, "experts": experts, "zero": zero}
    sources = dict.fromkeys((line["kind"], line["source_id"]) for line in lines)
    by_source = {
        f"{kind} {source}": summary([line for line in lines if (line["kind"], line["source_id"]) == (kind, source)])
        for kind, source in sources
    }
    precisions = dict.fromkeys(_place(line) for line in lines)
    return {
        "benchmark": "throughput",
        "quick": quick,
        "left_out": not in_use,
        "file_rows": published.rows,
        "skipped": dict(published.skipped),
        "sweeps": lines,
        "summary": {name: summary(group) for name, group in groups.items() if group},
        "sources": by_source,
        "kinds": {
            kind: of_kind({name: line for name, line in by_source.items() if name.startswith(kind)})
            for kind in dict.fromkeys(line["kind"] for line in lines)
        },
        "precisions": {place: summary([line for line in lines if _place(line) == place]) for place in precisions},
    }


def without_each_family(sweeps: list[Sweep]) -> dict[str, Effects]:
    """What published runs say of the constants, without each family of sources in turn."""
    tuner = Tuner(sweeps)
    return {family: tuner.tune(family) for family in dict.fromkeys(tuner.families.tolist())}


def _place(line: dict[str, Any]) -> str:
    return f"{line['kind']} {line['accelerator']} {precision_family(line['precision'])}"


def of_kind(sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over sources, all alike: over all of them, and over those with at least `MANY_ROWS` rows."""
    many = {name: line for name, line in sources.items() if line["rows"] >= MANY_ROWS}

    def means(lines: dict[str, dict[str, Any]]) -> dict[str, Any]:
        keys = ("zero_shot_mape_pct", "zero_shot_coverage_pct", "zero_shot_roofline_mape_pct", "known_mape_pct")
        values = {key: _mean(list(lines.values()), key) for key in (*keys, "mape_pct", "coverage_pct")}
        inside = [75 <= line["zero_shot_coverage_pct"] <= 85 for line in lines.values()]
        return {"sources": len(lines), **values, "coverage_75_to_85": sum(inside)}

    return {"all": means(sources), f"{MANY_ROWS} rows and more": means(many)}


COLUMNS = {
    "nodes": "nodes",
    "rows": "rows",
    "fitted_rows": "fit",
    "mape_pct": "MAPE",
    "regret_pct": "regret",
    "coverage_pct": "cover",
    "nearest_mape_pct": "nearest",
    "nearest_regret_pct": "regret",
    "roofline_mape_pct": "roofline",
    "roofline_regret_pct": "regret",
    "zero_shot_mape_pct": "0: MAPE",
    "zero_shot_regret_pct": "0: regret",
    "zero_shot_coverage_pct": "0: cover",
    "known_mape_pct": "known: MAPE",
    "zero_shot_roofline_mape_pct": "0: roofline",
    "zero_shot_roofline_regret_pct": "regret",
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
    titles = ("sources", "precisions", "summary")
    for title, groups in ((title, result[title]) for title in titles):
        table = Table(title, "sweeps", *list(COLUMNS.values())[3:-1], title="means over sweeps; coverage over rows")
        for name, line in groups.items():
            table.add_row(name, str(line["sweeps"]), *(_cell(line[key]) for key in list(COLUMNS)[3:-1]))
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
    for kind, groups in result["kinds"].items():
        for name, line in groups.items():
            console.print(
                f"{kind}, sources alike, {name} ({line['sources']}): "
                f"with no row MAPE {_cell(line['zero_shot_mape_pct'])} "
                f"(roofline {_cell(line['zero_shot_roofline_mape_pct'])}, known {_cell(line['known_mape_pct'])}), "
                f"intervals hold {_cell(line['zero_shot_coverage_pct'])}, 75 to 85 % in {line['coverage_75_to_85']}; "
                f"with rows {_cell(line['mape_pct'])} and {_cell(line['coverage_pct'])}"
            )
    console.print(f"rows of the files: {result['file_rows']}; not usable: {result['skipped']}")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("throughput", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with throughput.csv")
    parser.add_argument("--quick", action="store_true", help="every fifth sweep")
    parser.add_argument("--in-use", action="store_true", help="judge the constants in use, which know all sources")
    options = parser.parse_args(arguments)
    if not (options.data / "throughput.csv").is_file():
        parser.error(f"--data: {options.data / 'throughput.csv'} is not there")
    result = run(read_all(options.data), options.quick, options.in_use)
    tell(result, show, options, console_of(options, width=200))
    return 0


if __name__ == "__main__":
    sys.exit(main())
