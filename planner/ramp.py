"""A batch that grows by schedule, as Megatron's `--rampup-batch-size start increment samples` does."""

import numpy as np

from planner.situation import Choice, Situation
from planner.wording import percent


class Ramp:
    """Grows the batch by equal increments over the first samples, whatever the noise is; keeps the layout.

    Megatron-LM (`num_microbatches_calculator.py`): from `start`, `increment` more after every samples ÷ ((largest −
    start) ÷ increment) sequences, up to the largest batch that may be chosen. Between what may be chosen it is rounded
    down. Runs the fastest micro-batch. Knows nothing of Goodput: it is what training recipes do.
    """

    name = "ramp"
    weighs_error = False

    def __init__(self, start: int, increment: int, samples: int | None) -> None:
        """`samples` is the length of the ramp in sequences; None for half of the job."""
        self.start = start
        self.increment = increment
        self.samples = samples

    def planned_batch(self, situation: Situation) -> np.ndarray:
        """Sequences that the schedule says, shape (R,)."""
        done = situation.samples_consumed
        length = (done + situation.samples_left) / 2 if self.samples is None else float(self.samples)
        largest = _batches(situation).max(axis=1)
        increments = np.maximum(np.ceil((largest - self.start) / self.increment), 1)
        taken = np.floor(done / (length / increments))
        return np.minimum(self.start + taken * self.increment, np.maximum(largest, self.start))

    def choose(self, situation: Situation) -> Choice:
        """The fastest configuration of this layout with the planned batch."""
        planned, batches = self.planned_batch(situation), _batches(situation)
        below = np.where(batches <= planned[:, None], batches, -np.inf).max(axis=1)
        wanted = np.where(np.isfinite(below), below, np.where(batches > 0, batches, np.inf).min(axis=1))
        unchanged = wanted == situation.running_batch
        return Choice(np.where(unchanged, situation.current, situation.fastest(batches == wanted[:, None])))

    def reason(self, situation: Situation, choice: Choice) -> str:
        """What the schedule says."""
        return f"the ramp is at a batch of {self.planned_batch(situation)[0]:.0f}"

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """Goodput is not what decides."""
        return f"gain {percent(situation.gain(index))}, but the ramp is a schedule"


def _batches(situation: Situation) -> np.ndarray:
    """Global batches of the layout that runs, 0 for other layouts; shape (R, C)."""
    return np.where(situation.same_layout(), situation.menu.global_batch, 0.0)
