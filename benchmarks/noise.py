"""Is the noise estimate unbiased, is its interval honest, is it the same on every layout, and what does it cost?

    python -m benchmarks.noise [--data DIR] [--quick] [--json] [--only synthetic,brute_force,layouts,overhead,meter]

The first part needs no training. The next three train the model of examples/shakespeare.yaml on gloo ranks on this
machine; DIR is its `data.cache`, filled where it is empty. `meter` is what `copus.NoiseMeter` costs in training loops
that are not ours, on random tokens. `--quick` does less of everything and takes a few minutes.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from benchmarks.noise_synthetic import SHAPES, measure
from benchmarks.paired import paired
from copus.data.prepare import prepare
from copus.job import JobConfig, load_job
from planner.config import PlannerConfig
from profiles.configuration import Configuration

SECTIONS = ("synthetic", "brute_force", "layouts", "overhead", "meter")
JOB = Path(__file__).parent.parent / "examples" / "shakespeare.yaml"


def _job(data: Path | None, ranks: int, layout: str = "") -> JobConfig:
    """The demo's job on so many ranks, its noise measured as it is by default after the first steps of a run."""
    degrees = layout or f"{{dp: {ranks}}}"
    overrides = [f"cluster.accelerators_per_node={ranks}", f"training.layout={degrees}", "training.global_batch=16"]
    overrides += [f"data.cache={data}"] if data else []
    job = load_job(JOB, overrides)
    measured_by_default = {
        name: getattr(PlannerConfig(), name) for name in PlannerConfig.model_fields if "noise" in name
    }
    settings = {**measured_by_default, "min_noise_samples": 1}
    return job.model_copy(update={"planner": job.planner.model_copy(update=settings)})


def synthetic(quick: bool) -> list[dict[str, Any]]:
    """(a) bias and coverage on gradients of known noise."""
    return [measure(parts, size, 500 if quick or parts > 8 else 2000) for parts, size in SHAPES]


def brute_force(data: Path | None, quick: bool) -> dict[str, Any]:
    """(b), (e): the demo's model at frozen weights, and how the norm layers follow the total while it trains."""
    from benchmarks.noise_model import brute_force as on_ranks
    from tests.ranks import run_ranks

    job = _job(data, 2)
    sizes = (40, 512, 60) if quick else (150, 2048, 200)
    seen: dict[str, Any] = run_ranks(2, on_ranks, job, *sizes, timeout_seconds=3000)[0]
    return {"online_steps": sizes[2], "low": seen["auto"]["low"], "high": seen["auto"]["high"], **seen}


def layouts(data: Path | None, quick: bool) -> dict[str, Any]:
    """(c): the same data and weights on layouts of four ranks."""
    from benchmarks.noise_model import same_on_every_layout
    from tests.ranks import run_ranks

    rows = []
    for tied in (False, True):
        job = _job(data, 4).model_copy()
        job = job.model_copy(update={"model": job.model.model_copy(update={"tied_embeddings": tied})})
        rows.append(run_ranks(4, same_on_every_layout, job, timeout_seconds=1200)[0])
    spreads = {
        "microbatch": max(_spread([row["microbatch"] for row in group]) for group in rows),
        "normlayer": max(_spread([row["normlayer"] for row in group]) for group in rows),
        "replica": max(
            _spread([row["replica"] for row in group if row["dp"] == replicas]) for group in rows for replicas in (2, 4)
        ),
    }
    return {
        "layouts": [row["layout"] for row in rows[0]],
        "tied_embeddings": [False, True],
        "max_relative_spread": spreads["microbatch"],
        "max_relative_spread_of": spreads,
    }


def _spread(rows: list[list[float]]) -> float:
    """Largest (max − min) / min over layouts, of any figure: |g|² of the step and |g_j|² of each part."""
    figures = np.array(rows)
    return float(((figures.max(axis=0) - figures.min(axis=0)) / figures.min(axis=0)).max())


def overhead(data: Path | None, quick: bool) -> dict[str, Any]:
    """(d): what measuring adds to a step, paired within one run."""
    from benchmarks.noise_model import step_times
    from tests.ranks import run_ranks

    rounds = 8 if quick else 64
    cases: dict[str, Any] = {}
    for layout, micro_batch, global_batch in (("{dp: 2}", 4, 16), ("{tp: 2}", 4, 16), ("{tp: 2}", 2, 2)):
        job = _job(data, 2, layout)
        lay = job.training.layout
        configuration = Configuration(layout=lay, micro_batch=micro_batch, global_batch=global_batch)
        cycle = job.planner.noise_every_steps
        seconds = run_ranks(2, step_times, job, configuration, rounds, timeout_seconds=1200)[0]
        adam = job.model_copy(update={"planner": job.planner.model_copy(update={"noise_metric": "adam"})})
        seconds_adam = run_ranks(2, step_times, adam, configuration, rounds // 2, timeout_seconds=1200)[0]
        rows = {name: paired(times, seconds["off"], cycle if name == "auto" else 1) for name, times in seconds.items()}
        rows |= {
            f"{name} (adam)": paired(times, seconds_adam["off"], 1)
            for name, times in seconds_adam.items()
            if name != "off"
        }
        del rows["off"]
        rows["normlayer, a measured step"] = rows["normlayer"]
        rows["normlayer"] = _sampled(rows)
        if "auto" not in rows:  # a lone micro-batch: what `normlayer` does too
            rows["auto"] = rows["normlayer"]
        off = float(np.median(seconds["off"]))
        cases[configuration.label] = {"off_seconds": off, "rounds": rounds, "overhead_pct": rows}
    return cases


def _sampled(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the norm layers cost on average: they are measured on some steps, and on fewer the micro-batches too."""
    settings = PlannerConfig()
    halved, sampled = 1 / settings.noise_halve_every_steps, 1 / settings.noise_every_steps
    return {
        key: halved * rows["microbatch"][key] + (sampled - halved) * rows["normlayer"][key]
        for key in ("median", "low", "high")
    }


def meter(quick: bool) -> dict[str, Any]:
    """What a meter adds to a step of somebody else's loop, paired within one run."""
    from benchmarks.noise_meter import LOOPS, measure

    cells = {}
    for kind in LOOPS:
        print(f"meter: {kind}", file=sys.stderr, flush=True)
        cells[kind] = measure(kind, 4 if quick else 16)
    return cells


def run(only: list[str], data: Path | None, quick: bool) -> dict[str, Any]:
    """The parts that are asked for."""
    result: dict[str, Any] = {"benchmark": "noise", "quick": quick}
    if "synthetic" in only:
        result["synthetic"] = synthetic(quick)
    if set(only) - {"synthetic", "meter"}:
        prepare(_job(data, 2), lambda stage, done, total: None)
    if "brute_force" in only:
        result["brute_force"] = brute_force(data, quick)
    if "layouts" in only:
        result["layouts"] = layouts(data, quick)
        result["max_relative_spread"] = result["layouts"]["max_relative_spread"]
    if "overhead" in only:
        result["overhead"] = overhead(data, quick)
        first = next(iter(result["overhead"].values()))
        result["overhead_pct"] = {name: row["median"] for name, row in first["overhead_pct"].items()}
    if "meter" in only:
        result["meter"] = meter(quick)
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    if "synthetic" in result:
        table = Table("J", "n", "bias |G|² %", "bias tr Σ %", "coverage %", "open %", title="known noise")
        for row in result["synthetic"]:
            table.add_row(
                str(row["parts"]),
                str(row["part_size"]),
                f"{row['bias_grad_sq_pct']:+.2f} ± {row['bias_grad_sq_error_pct']:.2f}",
                f"{row['bias_trace_pct']:+.2f} ± {row['bias_trace_error_pct']:.2f}",
                f"{row['coverage_pct']:.1f}",
                f"{row['unbounded_pct']:.1f}",
            )
        console.print(table)
    if "brute_force" in result:
        seen = result["brute_force"]
        console.print(
            f"brute force, {seen['sequences']} sequences after {seen['training_steps']} steps of training: "
            f"B = {seen['truth']:.1f}; norm layers alone {seen['norm_layers_truth']:.1f}"
        )
        for name in ("auto", "microbatch"):
            row = seen[name]
            low, value, high = (f"{row[key]:.1f}" if row[key] is not None else "?" for key in ("low", "value", "high"))
            console.print(f"  {name} after {seen['online_steps']} steps: {value} ({low} to {high})")
        console.print(f"norm layers against the total, in training: {seen['correlation']}")
    if "layouts" in result:
        row = result["layouts"]
        console.print(f"largest relative spread over {', '.join(row['layouts'])}: {row['max_relative_spread_of']}")
    for label, case in result.get("overhead", {}).items():
        table = Table("source", "overhead %", "90 %", title=f"{label}: {1e3 * case['off_seconds']:.0f} ms a step")
        for name, row in case["overhead_pct"].items():
            table.add_row(name, f"{row['median']:+.1f}", f"{row['low']:+.1f} to {row['high']:+.1f}")
        console.print(table)
    if "meter" in result:
        table = Table("loop", "clock", "ms a step", "added %", "measured %", "others %", "check %", title="a meter")
        for kind, cell in result["meter"].items():
            for clock, rows in cell["overhead_pct"].items():
                shown = [f"{row['median']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})" for row in rows.values()]
                table.add_row(kind, clock, f"{1e3 * cell['off_seconds'][clock]:.0f}", *shown)
        console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("noise", __doc__)
    parser.add_argument("--data", type=Path, help="folder of fetched text and prepared data")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    if unknown := set(only) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    result = run(only, options.data, options.quick)
    tell(result, show, options, console_of(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
