"""How fast are predictions, how long does the whole space of a large job take, and how long a decision?

    python -m benchmarks.planner_speed [--quick] [--json]

One core: what is reported are processor seconds, summed over all threads, as the machine may be busy; the wall clock
is printed beside them. The space: a 1 T model (128 layers, hidden 25,600) on 16,384 H100, every layout, micro-batch,
recomputation and ZeRO stage for five global batches. The decisions are those of a running job that measured nothing
beforehand, after steps in three configurations: of this model, and of the demo's.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.command import console_of, parser_of, tell
from copus.job import load_job
from planner.config import PlannerConfig
from planner.planner import Planner
from planner.predictor import Predictor
from profiles.accelerator import accelerator
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel, Predicted, Timings
from profiles.cost.select import select
from profiles.enumerate import enumerate_configurations
from profiles.layout import Layout
from profiles.memory import MemoryModel
from profiles.model_shape import ModelShape
from profiles.noise_scale import NoiseScale

MODEL = ModelShape(
    **{"layers": 128, "hidden": 25600, "ffn_hidden": 102400, "heads": 160, "kv_heads": 160},
    **{"seq_len": 2048, "vocab": 51200, "gated_mlp": False, "tied_embeddings": True},
)
"""Megatron-LM's trillion (2104.04473, table 1)."""
CLUSTER = Cluster(nodes=2048, accelerators_per_node=8, accelerator="h100-sxm")
GLOBAL_BATCHES = (1024, 2048, 4096, 8192, 16384)
PRECISION = "bf16"
DEMO = Path(__file__).parent.parent / "examples" / "shakespeare.yaml"
MARGIN = 0.1
"""Share of an accelerator's memory that is left free."""
FITTED = 12
"""Rows of the fitted model that is timed too."""


def timed(what: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Processor seconds (median, lowest, highest) and wall seconds (median) of a call."""
    busy, wall = [], []
    for _ in range(repeats):
        start, began = time.process_time(), time.perf_counter()
        what()
        busy.append(time.process_time() - start)
        wall.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(busy),
        "low": min(busy),
        "high": max(busy),
        "wall_seconds": statistics.median(wall),
    }


def space() -> Configurations:
    """The whole space."""
    return enumerate_configurations(MODEL, CLUSTER, GLOBAL_BATCHES, max_tp=32, max_vp=64, max_cp=16)


def plan(cost: CostModel) -> tuple[Configurations, Predicted]:
    """Enumerate, check for memory, predict what fits."""
    configurations = space()
    memory_bytes = accelerator(CLUSTER.accelerator).memory_bytes
    configurations = configurations.take(MemoryModel().fits(MODEL, configurations, PRECISION, memory_bytes, MARGIN))
    return configurations, cost.predict(MODEL, CLUSTER, configurations, PRECISION, coverage=None)


def trillion() -> Planner:
    """Of a job of the large model, in a layout of the Megatron-LM paper."""
    layout = Layout(tp=8, pp=16, dp=128, zero=1, sequence_parallel=True, recompute="full")
    start = Configuration(layout=layout, micro_batch=1, global_batch=2048)
    config = PlannerConfig(min_global_batch=1024, max_global_batch=16384, max_micro_batch=8)
    return _planner(config, MODEL, CLUSTER, PRECISION, start)


def demo() -> Planner:
    """Of the demo."""
    job = load_job(DEMO)
    return _planner(job.planner, job.model, job.cluster, job.training.precision, job.training.configuration)


def _planner(
    config: PlannerConfig, model: ModelShape, cluster: Cluster, precision: str, start: Configuration
) -> Planner:
    return Planner(Predictor.from_rows(config, model, cluster, precision, start))


def decisions(planner: Planner, repeats: int) -> dict[str, float]:
    """How long one takes, and its candidates."""
    space = planner.candidates
    for ran in (space[0], space[len(space) // 3], space[len(space) // 2]):
        seconds = planner.throughput.predict(ran)
        assert seconds is not None
        assert seconds.step_seconds is not None
        for _ in range(10):
            planner.throughput.observe(ran, 0.8 * seconds.step_seconds)
    batch, samples = float(np.median([configuration.global_batch for configuration in space])), 0

    def decide() -> None:
        nonlocal samples
        samples += planner.config.every_samples
        noise = NoiseScale(grad_sq=1.0, noise_trace=batch, value=batch, low=0.8 * batch, high=1.25 * batch, samples=100)
        planner.decide(noise, ran, samples)

    return {"candidates": len(space), **timed(decide, repeats)}


def run(quick: bool) -> dict[str, Any]:
    """All timings."""
    repeats = 3 if quick else 7
    cost, everything = CostModel(), space()
    many = everything.take(np.resize(np.arange(len(everything)), 200_000 if quick else 1_000_000))
    fast = timed(lambda: cost.predict(MODEL, CLUSTER, many, PRECISION, coverage=None), repeats)
    some = many.take(np.arange(50_000))
    sure = timed(lambda: cost.predict(MODEL, CLUSTER, some, PRECISION), repeats)
    fitted = _fitted(cost, everything)
    measured = timed(lambda: fitted.predict(MODEL, CLUSTER, some, PRECISION, coverage=None), repeats)
    enumerated = timed(space, repeats)
    whole = timed(lambda: plan(cost), repeats)
    decided = {name: decisions(planner(), repeats) for name, planner in (("demo", demo), ("trillion", trillion))}
    return {
        "benchmark": "planner_speed",
        "decisions": decided,
        "quick": quick,
        "predictions_per_second": len(many) / fast["seconds"],
        "predictions_per_second_low": len(many) / fast["high"],
        "predictions_per_second_high": len(many) / fast["low"],
        "predictions": len(many),
        "with_interval_per_second": len(some) / sure["seconds"],
        "fitted_per_second": len(some) / measured["seconds"],
        "fitted_rows": fitted.rows,
        "space_configurations": len(everything),
        "space_that_fit": len(plan(cost)[0]),
        "enumerate_seconds": enumerated["seconds"],
        "space_seconds": whole["seconds"],
        "space_seconds_low": whole["low"],
        "space_seconds_high": whole["high"],
        "space_wall_seconds": whole["wall_seconds"],
    }


def _fitted(cost: CostModel, everything: Configurations) -> CostModel:
    """A model with rows: the predictions themselves, 10 % slower."""
    chosen = everything.take(select(cost, MODEL, CLUSTER, everything, PRECISION, FITTED))
    seconds = 1.1 * cost.predict(MODEL, CLUSTER, chosen, PRECISION, coverage=None).seconds
    return cost.fit([Timings(MODEL, CLUSTER, PRECISION, chosen, seconds)])


def show(result: dict[str, Any], console: Console) -> None:
    """Lines for people."""
    r = result
    console.print(
        f"predictions/s, no rows: {r['predictions_per_second']:,.0f} ({r['predictions_per_second_low']:,.0f} to "
        f"{r['predictions_per_second_high']:,.0f}; {r['predictions']:,} at once); with an interval "
        f"{r['with_interval_per_second']:,.0f}; fitted to {r['fitted_rows']} rows {r['fitted_per_second']:,.0f}"
    )
    console.print(
        f"{MODEL.parameters / 1e12:.2f} T parameters on {CLUSTER.accelerators:,} accelerators: "
        f"{r['space_configurations']:,} configurations, {r['space_that_fit']:,} fit; {r['space_seconds']:.2f} s "
        f"({r['space_seconds_low']:.2f} to {r['space_seconds_high']:.2f}), of which "
        f"enumeration {r['enumerate_seconds']:.2f}; wall clock {r['space_wall_seconds']:.2f} s"
    )
    for name, timing in r["decisions"].items():
        console.print(
            f"a decision among {timing['candidates']:,} candidates ({name}): {1000 * timing['seconds']:.0f} ms "
            f"({1000 * timing['low']:.0f} to {1000 * timing['high']:.0f}); "
            f"wall clock {1000 * timing['wall_seconds']:.0f} ms"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("planner_speed", __doc__)
    parser.add_argument("--quick", action="store_true", help="fewer predictions and repeats")
    options = parser.parse_args(arguments)
    result = run(options.quick)
    tell(result, show, options, console_of(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
