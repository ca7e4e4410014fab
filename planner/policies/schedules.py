"""Batches that follow a schedule: they keep the layout, and wait for neither a noise scale nor measurements."""

import numpy as np

from planner.situation import Choice, Situation


class _Schedule:
    """Runs the planned batch in the layout that runs, with its fastest micro-batch. If the planned batch may not be
    chosen, the next smaller one runs, or else the smallest."""

    name: str
    weighs_error = False
    needs_noise = False
    picks_start = True

    def planned_batch(self, situation: Situation) -> np.ndarray:
        """Sequences that the schedule asks for, shape (R,)."""
        raise NotImplementedError

    def choose(self, situation: Situation) -> Choice:
        """The fastest configuration of this layout with the planned batch."""
        planned, batches = self.planned_batch(situation), _batches(situation)
        below = np.where(batches <= planned[:, None] * (1 + 1e-9), batches, 0.0).max(axis=1)
        wanted = np.where(below > 0, below, np.where(batches > 0, batches, np.inf).min(axis=1))
        unchanged = wanted == situation.running_batch
        return Choice(np.where(unchanged, situation.current, situation.fastest(batches == wanted[:, None])))

    def reason(self, situation: Situation, choice: Choice) -> str:
        """What the schedule asks for."""
        return f"the {self.name} schedule is at a batch of {self.planned_batch(situation)[0]:.0f}"

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """Goodput is not what decides."""
        return f"{self.name} is a schedule"


class Ramp(_Schedule):
    """Grows the batch by equal increments over the first samples, as Megatron's `--rampup-batch-size` does.

    Megatron-LM (`num_microbatches_calculator.py`): from `start`, `increment` more after every samples ÷ ((largest −
    start) ÷ increment) sequences, up to the largest batch that may be chosen. It is what training recipes do.
    """

    name = "ramp"

    def __init__(self, start: int, increment: int, samples: int | None) -> None:
        """`samples` is the length of the ramp in sequences; None for half of the job."""
        self.start = start
        self.increment = increment
        self.samples = samples

    def planned_batch(self, situation: Situation) -> np.ndarray:
        """`start` plus the increments so far, shape (R,)."""
        done = situation.samples_consumed
        length = (done + situation.samples_left) / 2 if self.samples is None else float(self.samples)
        largest = _batches(situation).max(axis=1)
        increments = np.maximum(np.ceil((largest - self.start) / self.increment), 1)
        taken = np.floor(done / (length / increments))
        return np.minimum(self.start + taken * self.increment, np.maximum(largest, self.start))


class Seesaw(_Schedule):
    """Grows the batch as the learning rate decays: B = B₀ / f, f the decayed learning rate over its peak.

    Seesaw (2510.14717) multiplies the learning rate by 1/√2 and the batch by 2 whenever the schedule would halve the
    learning rate. With a learning rate that follows the root of the batch (`training.lr_batch_exponent` 0.5) both
    happen: f · √(B/B₀) = √f. Without any decay it stays at B₀, the batch of the job file.
    """

    name = "seesaw"

    def planned_batch(self, situation: Situation) -> np.ndarray:
        """B₀ / f, shape (R,)."""
        first = _first_batch(situation)
        return first if situation.lr_decay is None else first / np.maximum(situation.lr_decay, 1e-6)


class LateSwitch(_Schedule):
    """Runs the batch of the job file for most of the run, and the largest that may be chosen at the end.

    2602.14208: on hard tasks the loss of a small batch catches up with that of a large one soon after a switch, so that
    the switch can wait for the last part of the data.
    """

    name = "late-switch"

    def __init__(self, at: float) -> None:
        """`at` is the share of the sequences after which the batch becomes the largest."""
        self.at = at

    def planned_batch(self, situation: Situation) -> np.ndarray:
        """The first batch, then the largest, shape (R,)."""
        done = situation.samples_consumed / (situation.samples_consumed + situation.samples_left)
        return np.where(done < self.at, _first_batch(situation), _batches(situation).max(axis=1))


def _batches(situation: Situation) -> np.ndarray:
    """Global batches of the layout that runs, 0 for other layouts; shape (R, C)."""
    return np.where(situation.same_layout(), situation.menu.global_batch, 0.0)


def _first_batch(situation: Situation) -> np.ndarray:
    if situation.start_batch is not None:
        return situation.start_batch
    batches = _batches(situation)
    return np.where(batches > 0, batches, np.inf).min(axis=1)
