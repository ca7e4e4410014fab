"""How far the critical batch lies from the simple noise scale: c in φ = c · B_simple, learned from changes of batch."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.forecast import QUANTILE_90
from planner.menu import Floats

BLOCKS = 16
"""Blocks of equal tokens on each side of a change: their means are nearly normal and nearly independent."""
STEPS_IN_BLOCK = 2
"""Fewer steps of the larger batch make blocks too uneven."""
NEAR = 0.25
"""A stretch is at most this share of all samples before the change: a parabola follows the loss curve so far."""
MAX_STEPS = 4096
"""Steps looked back on."""
SYSTEMATIC = 0.3
"""Standard deviation of the logarithm of φ by which a single change may mislead: the efficiency of batches follows
1 / (1 + B/φ) only about so well, and the learning rate moves meanwhile."""
REACH = 3.0
"""Logarithm of the largest factor either way, from the prior, that is thought of."""
POINTS = 121
_NODES = np.polynomial.hermite_e.hermegauss(7)


@dataclass(frozen=True)
class _Change:
    samples: int
    before: int
    after: int
    noise: tuple[float, float]


class CriticalBatchFactor:
    """The posterior of log c, on a grid: a normal prior times the likelihood of the losses around changes of batch.

    By 1 / (1 + B/φ) a change of batch changes how fast the loss falls per token, by a ratio that depends on φ, so every
    change of batch that training makes anyway is an experiment on c. Feed it every step. A change is judged once, from
    equally long stretches on both sides: when as many samples lie behind it as the window has, or when the next comes.
    """

    def __init__(self, prior: float, factor: float, window_samples: int) -> None:
        """`prior` is the middle of c, and `factor` how far the ends of its 90 % interval lie from it either way; 1
        takes it for exact. `window_samples` is the longest stretch looked at, in sequences."""
        self.noise_scale: tuple[float, float] | None = None
        """B_simple now, in sequences, and the standard error of its logarithm; None while that is not known."""
        self._prior = prior
        self._prior_error = math.log(factor) / QUANTILE_90
        self._window = window_samples
        self._shifts = np.linspace(-REACH, REACH, POINTS)
        self._log_likelihood = np.zeros(POINTS)
        # (first sample, sequences, loss) of each step
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=MAX_STEPS)
        self._batch: int | None = None
        self._segment = 0
        """First sample of the stretch of equal batch before the open change, or of the present one."""
        self._open: _Change | None = None

    @property
    def value(self) -> float:
        """c: the median of its posterior, as good as its mean."""
        return self._prior * math.exp(self._moments()[0])

    @property
    def error(self) -> float:
        """Standard error of log c."""
        return self._moments()[1]

    @property
    def ends(self) -> tuple[float, float]:
        """The 90 % interval of c."""
        factor = math.exp(QUANTILE_90 * self.error)
        return self.value / factor, self.value * factor

    def observe(self, samples_consumed: int, global_batch: int, loss: float) -> None:
        """A step ended at `samples_consumed` with this mean training loss."""
        first = samples_consumed - global_batch
        if self._batch is None:
            self._segment = first
        elif global_batch != self._batch:
            self._judge(first)
            if self.noise_scale is not None:
                self._open = _Change(first, self._batch, global_batch, self.noise_scale)
            else:
                self._segment = first
        self._batch = global_batch
        if math.isfinite(loss):
            self._steps.append((first, global_batch, loss))
        if self._open is not None and samples_consumed >= self._open.samples + self._enough(self._open):
            self._judge(samples_consumed)

    def _enough(self, change: _Change) -> int:
        """Samples on one side of a change beyond which nothing is looked at."""
        return min(self._window, int(NEAR * change.samples))

    def _judge(self, samples_consumed: int) -> None:
        """Judge the open change, and close it."""
        change = self._open
        if change is None:
            return
        began = max(self._segment, self._steps[0][0]) if self._steps else change.samples
        self._open, self._segment = None, change.samples
        reach = min(self._enough(change), samples_consumed - change.samples, change.samples - began)
        if reach < STEPS_IN_BLOCK * BLOCKS * max(change.before, change.after):
            return  # too few steps to say anything
        blocks = _block_means(np.array(self._steps), change.samples, reach)
        if blocks is None:
            return
        noise_scale, error = change.noise
        spread = math.hypot(error, SYSTEMATIC)
        phi = self._prior * noise_scale * np.exp(self._shifts[:, None] + spread * _NODES[0])
        likelihood = log_likelihood(*blocks, change.before, change.after, phi)
        if likelihood is not None:
            highest = likelihood.max()
            self._log_likelihood += highest + np.log(np.exp(likelihood - highest) @ _NODES[1])

    def _moments(self) -> tuple[float, float]:
        """Mean and standard deviation of log(c / prior)."""
        if not self._prior_error:
            return 0.0, 0.0
        log = self._log_likelihood - 0.5 * (self._shifts / self._prior_error) ** 2
        weight = np.exp(log - log.max())
        weight /= weight.sum()
        mean = float(weight @ self._shifts)
        return mean, math.sqrt(float(weight @ (self._shifts - mean) ** 2))

    def state(self) -> dict[str, Any]:
        """What was learned, as plain values for a checkpoint; an open change is forgotten."""
        return {"prior": self._prior, "log_likelihood": self._log_likelihood.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing, and neither does one about another prior."""
        if state and state["prior"] == self._prior and len(state["log_likelihood"]) == POINTS:
            self._log_likelihood = np.array(state["log_likelihood"])


def log_likelihood(
    before: Floats, after: Floats, batch_before: int, batch_after: int, critical_batch: Floats
) -> Floats | None:
    """Logarithm of the likelihood of every φ in an array of any shape, up to a constant, from the mean losses of blocks
    at equal distances in tokens on both sides of a change of batch.

    Training sees useful tokens: after the change x tokens are worth ρ·x, with ρ = (1 + B_before/φ) / (1 + B_after/φ).
    In useful tokens the loss stays on one smooth curve, which a parabola follows nearby, but for a jump:

        loss = a + b·s + d·s² + j·[x > 0],    s = x before, ρ·x after

    So the bend d is scaled by ρ² on the far side. For each φ the four coefficients are fitted by least squares; with an
    unknown scatter of n blocks the likelihood is then RSS^(−(n − 4)/2). None if the best fit does not fall: then there
    is nothing to compare with.
    """
    n = len(before)
    x = np.concatenate([np.arange(-n, 0) + 0.5, np.arange(len(after)) + 0.5]) / n
    y = np.concatenate([before, after])
    later = (x > 0).astype(float)
    phi = np.asarray(critical_batch, float)[..., None]
    ratio = (1 + batch_before / phi) / (1 + batch_after / phi)
    s = np.where(later, ratio, 1.0) * x
    design = np.stack([np.ones_like(s), s, s**2, np.broadcast_to(later, s.shape)], axis=-1)
    # Columns of the same size: with a ρ of a few per cent the normal equations are ill-conditioned otherwise.
    scale = np.sqrt((design**2).sum(axis=-2, keepdims=True))
    design = design / scale
    transposed = np.swapaxes(design, -1, -2)
    beta = np.linalg.solve(transposed @ design, transposed @ y[:, None])
    residual = y - (design @ beta)[..., 0]
    squares = (residual**2).sum(axis=-1)
    best = np.unravel_index(int(squares.argmin()), squares.shape)
    if beta[(*best, 1, 0)] >= 0 or squares.min() <= 0:
        return None
    return np.asarray(-(len(x) - 4) / 2 * np.log(squares / squares.min()))


def _block_means(steps: Floats, change: int, reach: int) -> tuple[Floats, Floats] | None:
    """Mean losses of BLOCKS blocks of `reach` samples before the change, and as many after; steps count where their
    middle lies. None if a block is empty."""
    middle = steps[:, 0] + steps[:, 1] / 2
    block = np.floor((middle - change) / reach * BLOCKS).astype(int) + BLOCKS
    kept = (block >= 0) & (block < 2 * BLOCKS)
    weight = np.bincount(block[kept], steps[kept, 1], 2 * BLOCKS)
    if np.any(weight == 0):
        return None
    means = np.bincount(block[kept], steps[kept, 1] * steps[kept, 2], 2 * BLOCKS) / weight
    return means[:BLOCKS], means[BLOCKS:]
