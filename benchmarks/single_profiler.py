"""Shards timed alone on one accelerator: how well do they, and the modelled network, predict the steps of a whole job?

`python -m benchmarks.single_profiler` times the shards of every feasible configuration of the demo's model in this one
process, then all of them in one job on several ranks, and predicts the second from the first. Beside it: from no row at
all, from four measured steps, and from both.
"""

import sys
import time
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from benchmarks.live_profiler import configurations, make_job, measure
from benchmarks.throughput import COVERAGE, coverage, judge, likely, mape, regret
from benchmarks.throughput import measure as choose
from copus.fingerprint import fingerprint_of
from copus.job import JobConfig
from copus.profiling.single import SingleProfiler
from profiles.configuration import Configuration
from profiles.cost import CostModel, Timings
from profiles.measurement import Measurement
from profiles.profiler import Task

STEPS = 4
"""Measured steps that the last two ways know."""


def measure_shards(wanted: list[Configuration], job: JobConfig) -> tuple[list[Measurement], float]:
    """Their shards, here; and the wall seconds that it took."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    profiler = SingleProfiler(Task(job.model, job.cluster, fingerprint_of(job), job.profile, job=job))
    return [profiler.measure(configuration) for configuration in wanted], time.perf_counter() - started


def score(cost: CostModel, timings: Timings, measured: np.ndarray) -> dict[str, Any]:
    """How a model that knows the steps at the places `known` predicts the others."""
    judged = judge(cost, timings, measured, likely(timings))
    misses = np.log1p(judged.errors)
    return {
        "mape_pct": mape(judged),
        "bias_pct": float(100 * np.expm1(misses.mean())),
        "scatter_pct": float(100 * misses.std(ddof=1)),
        "regret_pct": regret(judged),
        "coverage_pct": coverage(judged),
    }


def run(ranks: int, max_batch: int, quick: bool, console: Console) -> dict[str, Any]:
    """Shards, steps, predictions."""
    job = make_job(ranks if quick else max_batch, ranks)
    wanted = configurations(job, quick)
    console.print(f"{len(wanted)} configurations of {job.model.parameters / 1e6:.1f} M parameters for {ranks} ranks")
    shards, shards_seconds = measure_shards(wanted, job)
    console.print(f"shards, one process: {shards_seconds:.0f} s")
    steps, _, steps_seconds = measure(wanted, job)
    console.print(f"steps, {ranks} ranks: {steps_seconds:.0f} s")
    alone = Timings.of(shards, job.cluster)
    (timings,) = Timings.of(steps, job.cluster)
    nothing = np.array([], dtype=np.int64)
    few, chosen = choose(CostModel(), timings, STEPS, likely(timings))
    ways = {
        "nothing": (CostModel(), nothing),
        "shards": (CostModel().fit(alone), nothing),
        f"{STEPS} steps": (few, chosen),
        f"shards and {STEPS} steps": (CostModel().fit([*alone, timings.take(chosen)]), chosen),
    }
    mine = fingerprint_of(job)
    return {
        "benchmark": "single_profiler",
        "quick": quick,
        "hardware": mine.hardware,
        "software": mine.software,
        "ranks": ranks,
        "configurations": len(wanted),
        "shards_seconds": shards_seconds,
        "steps_seconds": steps_seconds,
        "nominal_coverage_pct": 100 * COVERAGE,
        "ways": {name: score(cost, timings, measured) for name, (cost, measured) in ways.items()},
        "rows": [
            {
                "configuration": step.configuration.label,
                "shard_seconds": shard.step_seconds,
                "seconds": step.step_seconds,
            }
            for shard, step in zip(shards, steps, strict=True)
        ],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    console.print(f"{result['hardware']} · {result['software']}")
    rows = Table("configuration", "a rank alone, ms", "a step, ms")
    for row in result["rows"]:
        rows.add_row(row["configuration"], *(_milliseconds(row[name]) for name in ("shard_seconds", "seconds")))
    console.print(rows)
    ways = Table("known", "MAPE %", "bias %", "scatter %", "regret %", "coverage %")
    for name, scores in result["ways"].items():
        ways.add_row(name, *(f"{value:.1f}" for value in scores.values()))
    console.print(ways)
    console.print(
        f"bias: of all predictions together, scatter: about it; regret: of choosing the fastest of each global batch; "
        f"coverage of intervals for {result['nominal_coverage_pct']:.0f} %"
    )


def _milliseconds(seconds: float | None) -> str:
    return "failed" if seconds is None else f"{1000 * seconds:.0f}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("single_profiler", __doc__)
    parser.add_argument("--quick", action="store_true", help="three configurations: whether it works")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the job; more than cores share them")
    parser.add_argument("--max-batch", type=int, default=16, help="largest global batch that is measured")
    options = parser.parse_args(arguments)
    console = console_of(options)
    tell(run(options.ranks, options.max_batch, options.quick, console), show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
