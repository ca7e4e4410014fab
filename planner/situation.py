"""What a policy may look at, and what it answers."""

from dataclasses import dataclass

import numpy as np

from planner.efficiency import efficiencies
from planner.forecast import CriticalBatchForecast
from planner.goodput import Objective
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
    objective: Objective = "plain"
    """Form of Goodput."""
    number: int = 0
    """Number of this decision."""
    plug_in: Floats | None = None
    """tr Σ/|ḡ|² of the steps since the last decision, sequences, shape (R,); None where none was measured."""
    started: bool = True
    """False before the first step: then choosing costs nothing."""

    def goodput(self, critical_batch: Floats) -> Floats:
        """Goodput of every candidate, shape (…, R, C), where φ has the shape (…, R)."""
        batch = self.menu.global_batch
        found = self.samples_per_second * efficiencies(batch, critical_batch[..., None])
        return found * np.sqrt(batch) if self.objective == "lr-aware" else found

    @property
    def running_batch(self) -> Floats:
        """Global batch of what runs, shape (R,)."""
        return self.menu.global_batch[self.current]

    def fastest(self, wanted: np.ndarray) -> Indices:
        """The fastest candidate of those `wanted`, shape (R, C); of equals the smaller micro-batch. What runs, where
        nothing is wanted."""
        speed = np.where(wanted, self.samples_per_second, -np.inf)
        ties = np.where(speed == speed.max(axis=1, keepdims=True), self.menu.micro_batch, np.iinfo(np.int64).max)
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
