"""What a policy may look at, and what it answers."""

from dataclasses import dataclass

import numpy as np

from planner.forecast import CriticalBatchForecast
from planner.goodput import Objective, progress_per_sample
from planner.menu import Floats, Indices, Menu


@dataclass(frozen=True)
class Situation:
    """R decisions to be taken, each for a run of its own, among the same C candidates: one in a job, many in a
    simulation. Batches and samples are in sequences."""

    menu: Menu
    """What may be chosen. What runs is among it."""
    samples_per_second: Floats
    """Predicted throughput, shape (R, C)."""
    throughput_error: Floats
    """Relative standard error of it, shape (R, C)."""
    unseen: np.ndarray
    """Which candidates the job has never run, shape (R, C): running them would teach how fast they are."""
    current: Indices
    """What runs, shape (R,)."""
    noise_scale: Floats
    """B_simple, shape (R,)."""
    critical_batch: Floats
    """φ from the latest noise scale, shape (R,)."""
    forecast: CriticalBatchForecast
    """φ from all noise scales so far, and where it is going."""
    samples_consumed: Floats
    """Sequences trained on so far, shape (R,)."""
    samples_left: Floats
    """Sequences to the end of the job as planned, shape (R,)."""
    samples_to_next: Floats
    """Sequences to the next decision, shape (R,)."""
    move_seconds: Floats
    """What a move costs: a batch, a micro-batch, a layout; shape (3,) or (R, 3), ascending."""
    trial_allowance: Floats
    """Seconds that a trial may take now, shape (R,): what the budget has left."""
    objective: Objective = "plain"
    """Form of Goodput."""
    number: int = 0
    """Number of this decision."""
    plug_in: Floats | None = None
    """tr Σ/|ḡ|² of the steps since the last decision, sequences, shape (R,); None if none was measured."""
    started: bool = True
    """False before the first step: then choosing costs nothing."""
    lr_decay: Floats | None = None
    """Learning rate that the schedule says now over its peak, for the reference batch, shape (R,); 1 during the
    warm-up. None if there is no schedule."""
    start_batch: Floats | None = None
    """Global batch of the job file, sequences, shape (R,); None for the smallest that may be chosen."""

    def goodput(self, critical_batch: Floats) -> Floats:
        """Goodput of every candidate, shape (…, R, C), where φ has the shape (…, R)."""
        worth = progress_per_sample(self.menu.global_batch, critical_batch[..., None], self.objective)
        return self.samples_per_second * worth

    def gain(self, index: int) -> float:
        """How much better a candidate's goodput is than the current one's, in the first run."""
        goodputs = self.goodput(self.critical_batch)[0]
        return float(goodputs[index] / goodputs[int(self.current[0])] - 1)

    @property
    def running_batch(self) -> Floats:
        """Global batch of what runs, shape (R,)."""
        return self.menu.global_batch[self.current]

    def fastest(self, wanted: np.ndarray) -> Indices:
        """The fastest candidate of those `wanted`, shape (R, C); of equals the one with the micro-batch nearest to what
        runs, then the smaller. What runs, if nothing is wanted."""
        speed = np.where(wanted, self.samples_per_second, -np.inf)
        size = np.log2(self.menu.micro_batch.astype(float))
        away = np.abs(size - size[self.current, None]) + 1e-6 * size
        ties = np.where(speed == speed.max(axis=1, keepdims=True), away, np.inf)
        return np.where(wanted.any(axis=1), ties.argmin(axis=1), self.current)

    def same_layout(self) -> np.ndarray:
        """Which candidates have the layout that runs, shape (R, C)."""
        return self.menu.layout == self.menu.layout[self.current, None]


@dataclass(frozen=True)
class Choice:
    """What each run does from now on, and what spoke for it."""

    index: Indices
    """Chosen candidates, shape (R,); `Situation.current` for no move."""
    saved_seconds: Floats | None = None
    """What moving to each candidate saves until the end of the job, less the move, at the pessimistic end; shape
    (R, C). None from policies that do not work it out."""
    exploring: np.ndarray | None = None
    """Whether the choice is made to learn how fast it is, shape (R,)."""
