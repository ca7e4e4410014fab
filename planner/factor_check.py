"""Whether a change of batch did to the loss what the critical batch said: a warning that c is off."""

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr

from planner.efficiency import statistical_efficiency
from planner.wording import three_digits

BLOCKS = 16
"""Blocks of equal tokens on each side of a change: their means are nearly normal and nearly independent."""
STEPS_IN_BLOCK = 2
"""Fewer steps of the larger batch make blocks too uneven."""
NEAR = 0.25
"""A stretch is at most this share of all samples before the change: a parabola follows the loss curve so far."""
LEVEL = 0.01
"""Share of checks that warn although nothing is wrong."""
MAX_STEPS = 4096
"""Steps looked back on."""


class Verdict(NamedTuple):
    """What a check found."""

    ratio: float
    """Loss per token just after the change over that just before."""
    expected: float
    """The same, from the critical batch that comes closest to `ratio`."""
    p_value: float
    """Chance of a difference at least this large where that critical batch is right."""


@dataclass(frozen=True)
class _Change:
    samples: int
    before: int
    after: int
    critical: tuple[float, float]


class FactorCheck:
    """Compares the loss per token before and after each change of batch with what 1 / (1 + B/φ) promises.

    Feed it every step. A change is judged once, from equally long stretches on both sides (see `judge`): when as many
    samples lie behind it as the window has, or when the next change comes. Nothing is kept over a restart.
    """

    def __init__(self, window_samples: int) -> None:
        """`window_samples` is the longest stretch looked at, in sequences."""
        self.critical_bounds: tuple[float, float] | None = None
        """Where φ is believed to lie now, in sequences; None while that is not known."""
        self._window = window_samples
        # (first sample, sequences, loss) of each step
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=MAX_STEPS)
        self._batch: int | None = None
        self._segment = 0
        """First sample of the stretch of equal batch before the open change, or of the present one."""
        self._open: _Change | None = None

    def observe(self, samples_consumed: int, global_batch: int, loss: float) -> str | None:
        """A step ended at `samples_consumed`. Returns a warning in one line, where one is due."""
        first = samples_consumed - global_batch
        warning = None
        if self._batch is None:
            self._segment = first
        elif global_batch != self._batch:
            warning = self._judge(first)
            if self.critical_bounds is not None:
                self._open = _Change(first, self._batch, global_batch, self.critical_bounds)
            else:
                self._segment = first
        self._batch = global_batch
        if math.isfinite(loss):
            self._steps.append((first, global_batch, loss))
        if self._open is not None and samples_consumed >= self._open.samples + self._enough(self._open):
            warning = warning or self._judge(samples_consumed)
        return warning

    def _enough(self, change: _Change) -> int:
        """Samples on one side of a change beyond which nothing is looked at."""
        return min(self._window, int(NEAR * change.samples))

    def _judge(self, samples_consumed: int) -> str | None:
        """Judge the open change, and close it."""
        change = self._open
        if change is None:
            return None
        began = max(self._segment, self._steps[0][0]) if self._steps else change.samples
        self._open, self._segment = None, change.samples
        reach = min(self._enough(change), samples_consumed - change.samples, change.samples - began)
        if reach < STEPS_IN_BLOCK * BLOCKS * max(change.before, change.after):
            return None  # too few steps to say anything
        blocks = _block_means(np.array(self._steps), change.samples, reach)
        if blocks is None:
            return None
        verdict = judge(*blocks, change.before, change.after, *change.critical)
        return None if verdict is None or verdict.p_value >= LEVEL else _in_words(verdict, change)


def judge(
    before: np.ndarray,
    after: np.ndarray,
    batch_before: int,
    batch_after: int,
    critical_low: float,
    critical_high: float,
) -> Verdict | None:
    """Test the slopes of the loss on both sides of a change of batch, from block means at equal distances in tokens.

    The loss is fitted by a smooth curve with a break at the change, x tokens from it:

        loss = a + b·x + d·x² + (j + h·x)·[x > 0]

    j takes up a passing jump and d the bend that every loss curve has; the slope is b before and b + h after. With φ
    the ratio of the slopes is ρ = (1 + B_before/φ) / (1 + B_after/φ), so h − (ρ − 1)·b is 0: a linear contrast, and a
    t-test with the scatter of the blocks themselves as its error. What is tested is the ρ within the bounds of φ that
    comes closest, so that a doubt about the noise scale is no doubt about c.

    None where the loss does not fall before the change: then there is nothing to compare with.
    """
    n = len(before)
    x = np.concatenate([np.arange(-n, 0) + 0.5, np.arange(len(after)) + 0.5]) / n
    y = np.concatenate([before, after])
    later = (x > 0).astype(float)
    design = np.stack([np.ones_like(x), x, x**2, later, later * x], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ design.T @ y
    freedom = len(x) - design.shape[1]
    variance = float(((y - design @ beta) ** 2).sum()) / freedom
    slope, change = float(beta[1]), float(beta[4])
    if slope >= 0 or variance == 0:
        return None
    ends = sorted(_ratio(batch_before, batch_after, critical) for critical in (critical_low, critical_high))
    ratio = 1 + change / slope
    expected = min(max(ratio, ends[0]), ends[1])
    contrast = np.array([0.0, 1 - expected, 0.0, 0.0, 1.0])
    t = float(contrast @ beta) / math.sqrt(variance * float(contrast @ inverse @ contrast))
    return Verdict(ratio=ratio, expected=expected, p_value=2 * float(stdtr(freedom, -abs(t))))


def _ratio(before: int, after: int, critical_batch: float) -> float:
    return statistical_efficiency(after, critical_batch) / statistical_efficiency(before, critical_batch)


def _block_means(steps: np.ndarray, change: int, reach: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean losses of BLOCKS blocks of `reach` samples before the change, and as many after; steps count where their
    middle lies. None where a block is empty."""
    middle = steps[:, 0] + steps[:, 1] / 2
    block = np.floor((middle - change) / reach * BLOCKS).astype(int) + BLOCKS
    kept = (block >= 0) & (block < 2 * BLOCKS)
    weight = np.bincount(block[kept], steps[kept, 1], 2 * BLOCKS)
    if np.any(weight == 0):
        return None
    means = np.bincount(block[kept], steps[kept, 1] * steps[kept, 2], 2 * BLOCKS) / weight
    return means[:BLOCKS], means[BLOCKS:]


def _in_words(verdict: Verdict, change: _Change) -> str:
    too = "small" if (verdict.ratio > verdict.expected) == (change.after > change.before) else "large"
    low, high = map(three_digits, change.critical)
    return (
        f"planner.critical_batch_factor seems too {too}: from batch {change.before} to {change.after} the loss per "
        f"token became {verdict.ratio:.2f}× what it was, and a critical batch of {low} to {high} sequences allows "
        f"{verdict.expected:.2f}× (p = {verdict.p_value:.1g}); `copus calibrate` measures it"
    )
