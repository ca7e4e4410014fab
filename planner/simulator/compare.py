"""All policies on one job: is adapting worth it, and what would each make of it?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planner.forecast import QUANTILE_90
from planner.goodput import Objective, progress_per_sample
from planner.menu import Floats, Menu
from planner.plan import Plan
from planner.policy import Policy
from planner.simulator.simulate import Runs, oracle, simulate


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
    noise: float = 0.3
    """Standard deviation of the logarithm of an estimate of φ."""
    factor_error: float = 1.0
    """What c is believed to be over what it is."""

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
    layout_moves: float
    """Mean number of moves to another layout."""
    batch_moves: float
    """Mean number of other moves."""
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
        setting.start,
    )
    runs = Runs(
        critical_batch=np.broadcast_to(setting.critical_batch, (seeds, len(setting.critical_batch))),
        progress=np.full(seeds, setting.progress),
        planned_samples=np.full(seeds, float(setting.total_samples)),
        every_samples=np.full(seeds, float(setting.every_samples)),
        move_seconds=np.broadcast_to(setting.move_seconds, (seeds, 3)),
        seed=np.arange(seeds),
        noise=np.full(seeds, setting.noise),
        factor_error=np.full(seeds, setting.factor_error),
        start=np.full(seeds, setting.start),
    )
    rows = []
    for name, policy in policies.items():
        found = simulate(setting.menu, setting.samples_per_second, runs, policy, setting.objective, record=True)
        mean = float(found.seconds.mean())
        half = QUANTILE_90 * float(found.seconds.std(ddof=1)) / seeds**0.5 if seeds > 1 else 0.0
        moves = found.moves.mean(axis=0)
        rows.append(
            Row(name, mean, mean - half, mean + half, float(moves[2]), float(moves[:2].sum()), tuple(found.paths[0]))
        )
    return plan, rows
