"""Runs to simulate, and what becomes of them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from planner.menu import Floats, Indices

KNOWN_STEPS = 20
"""Steps after which a job knows its noise scale (`planner.min_noise_samples`)."""
EARLY = 0.03
"""Share of the progress in which an early error of φ falls to 1/e of its logarithm."""
DRAWS = 1024
"""Errors of noise estimates, and of the machine, that a seed makes; a longer run begins anew with the first."""


@dataclass(frozen=True)
class Runs:
    """R runs to simulate. Samples and batches are in sequences."""

    critical_batch: Floats
    """True φ on the grid of `planner.simulator.trajectory`, shape (R, POINTS)."""
    progress: Floats
    """Effective samples that the target takes, shape (R,)."""
    planned_samples: Floats
    """Length of the job as its file says, shape (R,): what policies believe is left of."""
    every_samples: Floats
    """Sequences between two decisions, shape (R,)."""
    move_seconds: Floats
    """Cost of a new batch, micro-batch, layout; shape (R, 3), ascending."""
    seed: Indices
    """Seeds, shape (R,). Equal seeds have equal errors, whatever the policy."""
    noise: Floats
    """Standard deviation of the logarithm of a noise estimate, shape (R,)."""
    factor_error: Floats
    """What c is believed to be over what it is, shape (R,)."""
    correlation: float = 0.0
    """Correlation of the errors of successive estimates."""
    throughput_error: float | tuple[float, ...] = 0.0
    """Standard deviation of the logarithm of predicted throughputs, of all configurations or of each; steps correct
    them as in a job (`profiles.online`)."""
    drift: float = 0.0
    """Standard deviation that the logarithm of the machine's speed reaches by the end, as a random walk, and a quarter
    of it for what each layout does besides."""
    bursts: float = 0.0
    """Share of the time between decisions in which something else takes half of the machine."""
    trial_budget: float = np.inf
    """Share of the elapsed time that trials may take."""
    factor_range: float = 1.0
    """How far the 90 % interval of c reaches either way at first, as a factor: changes of batch then teach it. 1: what
    is believed of c stays."""
    first_guess: Floats | None = None
    """What laws say of φ before the first step over what it is, shape (R,): a start in the dark, as of a job. The noise
    scale is then an average over the steps so far (`planner.simulator.meter`), unknown for the first `KNOWN_STEPS`, and
    its errors are those of the steps, not `noise`. None: the job begins with one estimate of φ, without any lag."""
    early_error: Floats | None = None
    """What φ is believed to be over what it is at the very beginning, beyond the error of c, shape (R,). It fades over
    the first `EARLY` of the progress."""
    lr_decay: Callable[[float], float] | None = None
    """Learning rate that the schedule says after so many sequences, over its peak; None without a schedule."""
    start_batch: Floats | None = None
    """Global batch of the job file, sequences, shape (R,), which schedules grow from; None for the smallest."""
    start: Indices | None = None
    """What runs first, shape (R,), and is left at the cost of a move; None if the policy picks it, for nothing."""

    def take(self, rows: np.ndarray) -> "Runs":
        """Some of the runs."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: a[rows] for name, a in arrays.items() if isinstance(a, np.ndarray)})


@dataclass(frozen=True)
class Outcome:
    """What became of R runs."""

    seconds: Floats
    """Time to the target, moves included, shape (R,)."""
    samples: Floats
    """Sequences trained on, shape (R,)."""
    moves: Indices
    """Moves made, by rung (batch, micro-batch, layout), shape (R, 3); those of trials that went back are left out."""
    trials: Indices
    """Trials made, shape (R,)."""
    paths: tuple[list[tuple[float, int]], ...] = ()
    """For each run the progress at which each configuration began; empty unless asked for."""

    @classmethod
    def unfinished(cls, runs: int, record: bool) -> "Outcome":
        """None of the runs has reached its target; whether their paths are to be recorded."""
        return cls(
            seconds=np.zeros(runs),
            samples=np.zeros(runs),
            moves=np.zeros((runs, 3), np.int64),
            trials=np.zeros(runs, np.int64),
            paths=tuple([] for _ in range(runs)) if record else (),
        )
