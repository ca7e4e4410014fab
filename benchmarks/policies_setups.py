"""The four set-ups of the COPUS paper, simulated on predicted throughput: our figures beside the paper's."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.config import PlannerConfig
from planner.job_estimate import estimate_job
from planner.menu import Menu
from planner.policies.cbs import CriticalBatch
from planner.policies.goodput import Goodput
from planner.policies.policy import Copus, Policy, Static
from planner.simulator.runs import Runs
from planner.simulator.simulate import oracle, simulate
from planner.simulator.trajectory import POINTS, geometric, kaplan_critical_batch
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.model_shape import ModelShape

SEQ_LEN = 2048
LOSSES = (7.0, 3.0)
"""Nats a token between which φ grows as Kaplan's law says: what a training on WikiText-103 goes through after its
first steps. The paper's own φ is not published."""
TOKENS = 1e9
"""Length of the run in tokens at the best fixed batch: some ten times WikiText-103."""
MOVE_SECONDS = 43.0
"""In the middle of the 30 to 56 s that the paper reports."""
DECISIONS = 200


@dataclass(frozen=True)
class Setup:
    """A line of the paper's evaluation."""

    name: str
    model: ModelShape
    accelerator: str
    accelerators: int
    paper_pct: float
    """Mean speed-up over the fastest baseline."""


def _model(layers: int, hidden: int, ffn_hidden: int, heads: int, kv_heads: int) -> ModelShape:
    """A Llama-like shape: the paper names sizes only."""
    return ModelShape(
        layers=layers,
        hidden=hidden,
        ffn_hidden=ffn_hidden,
        heads=heads,
        kv_heads=kv_heads,
        seq_len=SEQ_LEN,
        vocab=50_304,
    )


SETUPS = (
    Setup("3B on 8 H100", _model(32, 2560, 6912, 32, 32), "h100-sxm", 8, 7.9),
    Setup("13B on 16 H100", _model(40, 5120, 13824, 40, 40), "h100-sxm", 16, 3.9),
    Setup("32B on 32 H100", _model(64, 5120, 27648, 40, 8), "h100-sxm", 32, 8.0),
    Setup("7B on 32 MI210", _model(32, 4096, 11008, 32, 32), "mi210", 32, 5.0),
)


def measure_setups(seeds: int, noise: float) -> list[dict[str, Any]]:
    """Gains of every set-up in %, moves paid and free: over the best fixed configuration and over the fastest baseline
    (that, or the critical batch in a fixed layout, pessimistic or optimistic)."""
    return [figures for setup in SETUPS for figures in (_measure(setup, seeds, noise, m) for m in (MOVE_SECONDS, 0.0))]


def _table(setup: Setup) -> tuple[Menu, np.ndarray]:
    """The fastest micro-batch of each layout and batch that fits, as the cost and the memory model say."""
    cluster = Cluster(nodes=setup.accelerators // 8, accelerators_per_node=8, accelerator=setup.accelerator)
    layout = Layout(tp=8, dp=setup.accelerators // 8, sequence_parallel=True, recompute="selective", zero=1)
    start = Configuration(layout=layout, micro_batch=1, global_batch=64)
    config = PlannerConfig(min_global_batch=8, max_global_batch=1024, max_micro_batch=8)
    estimate = estimate_job(config, setup.model, cluster, "bf16", start)
    best: dict[tuple[Layout, int], tuple[float, Configuration]] = {}
    for candidate in estimate.candidates:
        if candidate.step_seconds is None or candidate.refusal:
            continue
        key = candidate.configuration.layout, candidate.configuration.global_batch
        if key not in best or candidate.step_seconds < best[key][0]:
            best[key] = (candidate.step_seconds, candidate.configuration)
    menu = Menu.of([configuration for _, configuration in best.values()])
    return menu, menu.global_batch / np.array([seconds for seconds, _ in best.values()])


def _measure(setup: Setup, seeds: int, noise: float, move_seconds: float) -> dict[str, Any]:
    menu, speed = _table(setup)
    phi = geometric(*(kaplan_critical_batch(loss, SEQ_LEN) for loss in LOSSES))
    fixed = oracle(menu, speed, phi, 1.0, np.zeros(3))
    samples = TOKENS / SEQ_LEN
    progress = samples / fixed.fixed_samples
    rungs = np.array([0.0, 0.0, move_seconds])
    plan = oracle(menu, speed, phi, progress, rungs)
    runs = Runs(
        critical_batch=np.broadcast_to(phi, (seeds, POINTS)),
        progress=np.full(seeds, progress),
        planned_samples=np.full(seeds, samples),
        every_samples=np.full(seeds, samples / DECISIONS),
        move_seconds=np.broadcast_to(rungs, (seeds, 3)),
        seed=np.arange(seeds),
        noise=np.full(seeds, noise),
        factor_error=np.ones(seeds),
    )
    policies: dict[str, Policy] = {
        "static": Static(),
        "cbs pessimistic": CriticalBatch("pessimistic"),
        "cbs optimistic": CriticalBatch("optimistic"),
        "copus": Copus(0.10),
        "goodput": Goodput(),
    }
    seconds = {name: float(simulate(menu, speed, runs, p).seconds.mean()) for name, p in policies.items()}
    fastest = min(seconds["cbs pessimistic"], seconds["cbs optimistic"], plan.fixed_seconds)
    return {
        "setup": setup.name,
        "simulated": True,
        "move_seconds": move_seconds,
        "hours": plan.fixed_seconds / 3600,
        "best_fixed": menu.configurations[plan.fixed_index].label,
        "paper_pct": setup.paper_pct,
        "oracle_over_best_fixed_pct": 100 * plan.gain,
        "over_best_fixed_pct": {name: 100 * (plan.fixed_seconds / s - 1) for name, s in seconds.items()},
        "over_fastest_baseline_pct": {n: 100 * (fastest / seconds[n] - 1) for n in ("copus", "goodput")},
    }


def print_setups(rows: list[dict[str, Any]]) -> None:
    """A line for each set-up and cost of moves."""
    low, high = (kaplan_critical_batch(loss, SEQ_LEN) for loss in LOSSES)
    print(
        f"\nCOPUS's set-ups, SIMULATED on the cost model's throughput; φ {low:.0f}→{high:.0f} sequences (Kaplan's law, "
        f"losses {LOSSES[0]:g}→{LOSSES[1]:g}), {TOKENS / 1e9:g} G tokens; gains in %"
    )
    print(f"{'set-up':16} {'move':>6} {'hours':>6} {'paper':>6}   over the best fixed configuration; over the baseline")
    for row in rows:
        gains = ", ".join(f"{name} {value:+.1f}" for name, value in row["over_best_fixed_pct"].items())
        ours = ", ".join(f"{name} {value:+.1f}" for name, value in row["over_fastest_baseline_pct"].items())
        print(
            f"{row['setup']:16} {row['move_seconds']:4.0f} s {row['hours']:6.1f} {row['paper_pct']:+6.1f}   {gains}, "
            f"oracle {row['oracle_over_best_fixed_pct']:+.1f}; {ours} ({row['best_fixed']})"
        )
