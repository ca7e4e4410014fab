"""All policies on one job: is adapting worth it, and what would each make of it?"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from planner.forecast import QUANTILE_90
from planner.goodput import Objective, progress_per_sample
from planner.menu import Floats, Menu
from planner.plan import Plan
from planner.policies.policy import Policy
from planner.simulator.runs import Outcome, Runs
from planner.simulator.simulate import best_fixed_seconds, oracle, simulate


@dataclass(frozen=True)
class Setting:
    """A job, and what happens to it."""

    menu: Menu
    """What may be chosen."""
    samples_per_second: Floats
    """Throughput of each, shape (C,)."""
    critical_batch: Floats
    """True φ on the grid of progress (`planner.simulator.trajectory`), sequences."""
    start: int
    """What runs first."""
    total_samples: float
    """Length of the job in sequences: the target is what they reach when nothing ever changes."""
    every_samples: float
    """Sequences between two decisions."""
    move_seconds: Floats
    """Cost of a new batch, micro-batch, layout; shape (3,)."""
    objective: Objective = "plain"
    """Form of Goodput, and of progress."""
    noise: float | None = None
    """Standard deviation of the logarithm of an estimate of φ, from the first decision on. None: estimates as a job has
    them, averages over its steps so far, after a start from `first_guess`."""
    first_guess: float = 1.0
    """What laws say of φ before the first step, over what it is."""
    plans_start: bool = False
    """Whether a policy that picks its start may begin elsewhere than in `start`, for nothing."""
    factor_error: float = 1.0
    """What c is believed to be over what it is."""
    factor_range: float = 1.0
    """How far the 90 % interval of c reaches either way at first: changes of batch then teach it. 1: it stays."""
    lr_decay: Callable[[float], float] | None = None
    """Learning rate after so many sequences, over its peak; None without a schedule."""
    throughput_error: float | tuple[float, ...] = 0.0
    """Standard deviation of the logarithm of each throughput; trials and steps correct it."""
    drift: float = 0.0
    """How much the machine's speed wanders (`Runs.drift`)."""
    bursts: float = 0.0
    """Share of the time in which something else takes half of the machine."""
    trial_budget: float = math.inf
    """Share of the time that trials may take."""

    @property
    def progress(self) -> float:
        """Effective samples of the target: those of `total_samples` at the starting batch."""
        batch = self.menu.global_batch[self.start]
        middles = np.sqrt(self.critical_batch[1:] * self.critical_batch[:-1])
        return float(self.total_samples / np.mean(1 / progress_per_sample(batch, middles, self.objective)))


@dataclass(frozen=True)
class Row:
    """What a policy made of it, over seeds."""

    policy: str
    """Its name."""
    seconds: float
    """Mean time to the target."""
    low: float
    """Lower end of the 90 % interval of the mean."""
    high: float
    """Upper end."""
    gain: float
    """Mean gain over the configuration that is the best fixed one in the same run, by its true times."""
    layout_moves: float
    """Mean number of moves to another layout."""
    batch_moves: float
    """Mean number of other moves."""
    trials: float
    """Mean number of trials."""
    moves_low: float
    """Moves of all kinds: the 5th percentile over seeds."""
    moves_high: float
    """The 95th percentile."""
    path: tuple[tuple[float, int], ...]
    """Progress at which each configuration began, with the first seed."""


def compare(setting: Setting, policies: Mapping[str, Policy], seeds: int = 16) -> tuple[Plan, list[Row]]:
    """The plan of somebody who knows φ, and every policy under the same errors. Raises ValueError for no seed."""
    if seeds < 1:
        raise ValueError(f"seeds({seeds}) has to be at least 1")
    plan = oracle(
        setting.menu,
        setting.samples_per_second,
        setting.critical_batch,
        setting.progress,
        setting.move_seconds,
        setting.objective,
        None if setting.plans_start else setting.start,
    )
    runs = _runs(setting, seeds)
    fixed = _best_fixed_seconds(setting, runs, plan)
    rows = []
    for name, policy in policies.items():
        start = None if setting.plans_start and policy.picks_start else np.full(seeds, setting.start)
        outcome = simulate(
            setting.menu,
            setting.samples_per_second,
            replace(runs, start=start),
            policy,
            setting.objective,
            record=True,
        )
        rows.append(_row(name, outcome, fixed))
    return plan, rows


def _best_fixed_seconds(setting: Setting, runs: Runs, plan: Plan) -> Floats:
    """What the best fixed configuration of hindsight takes in each run: if tables are wrong or the machine wanders, it
    is another one in each."""
    if not (np.any(setting.throughput_error) or setting.drift or setting.bursts):
        return np.full(len(runs.seed), plan.fixed_seconds)
    return best_fixed_seconds(setting.menu, setting.samples_per_second, runs, setting.objective)


def _runs(setting: Setting, seeds: int) -> Runs:
    """One run a seed, all but the start."""
    return Runs(
        critical_batch=np.broadcast_to(setting.critical_batch, (seeds, len(setting.critical_batch))),
        progress=np.full(seeds, setting.progress),
        planned_samples=np.full(seeds, float(setting.total_samples)),
        every_samples=np.full(seeds, float(setting.every_samples)),
        move_seconds=np.broadcast_to(setting.move_seconds, (seeds, 3)),
        seed=np.arange(seeds),
        noise=np.full(seeds, setting.noise or 0.0),
        factor_error=np.full(seeds, setting.factor_error),
        throughput_error=setting.throughput_error,
        drift=setting.drift,
        bursts=setting.bursts,
        trial_budget=setting.trial_budget,
        factor_range=setting.factor_range,
        first_guess=np.full(seeds, setting.first_guess) if setting.noise is None else None,
        lr_decay=setting.lr_decay,
        start_batch=np.full(seeds, setting.menu.global_batch[setting.start]),
    )


def _row(name: str, outcome: Outcome, fixed: Floats) -> Row:
    """Means over the seeds, with the interval of that of the time."""
    seeds, mean = len(outcome.seconds), float(outcome.seconds.mean())
    half = QUANTILE_90 * float(outcome.seconds.std(ddof=1)) / seeds**0.5 if seeds > 1 else 0.0
    by_rung, all_moves = outcome.moves.mean(axis=0), outcome.moves.sum(axis=1)
    return Row(
        policy=name,
        seconds=mean,
        low=mean - half,
        high=mean + half,
        gain=float(np.mean(fixed / outcome.seconds - 1)),
        layout_moves=float(by_rung[2]),
        batch_moves=float(by_rung[:2].sum()),
        trials=float(outcome.trials.mean()),
        moves_low=float(np.percentile(all_moves, 5)),
        moves_high=float(np.percentile(all_moves, 95)),
        path=tuple(outcome.paths[0]),
    )
