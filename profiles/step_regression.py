"""Which part of what steps are off by is the machine's at the time, and which their configuration's: a regression."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TAIL = 4.0
"""Degrees of freedom of a block's Student-t noise: a block that no drift and no miss explains counts less and less."""
FREEDOM = 4.0
"""Configurations that the assumed size of misses is worth: how soon the misses seen set the width of intervals."""
WANDER = 1e-3
"""What the machine is expected to change by from one step to the next: a standard deviation, as a logarithm."""
WANDER_WEIGHT = 2.0
"""Changes between blocks that this is worth beside those that are seen."""
JUMPS = 2.0
"""Degrees of freedom of the Student-t changes of the machine: mostly next to none, and jumps when a tenant comes."""
ROUNDS = 10
"""Rounds of expectation maximization."""
DRIFT_WEIGHT = 8.0
"""Blocks that the drift which is expected of a machine is worth beside the drift that is seen."""


class Block(NamedTuple):
    """One observation: the median of a few successive steps, or the result of a comparison."""

    place: int
    """The configuration, in the order of the first steps."""
    versus: int
    """The configuration that it was compared with; −1 for ordinary steps."""
    off: float
    """Logarithm of seen ÷ predicted; of the ratio of two times for a comparison."""
    steps: float
    """Steps in it."""
    start: float
    """Training seconds before its first step."""
    end: float
    """Training seconds after its last."""
    error: float
    """Standard error of a comparison; 0 for ordinary steps, whose noise is that of all steps."""

    def merged(self, later: "Block") -> "Block":
        """Two neighbouring blocks of one configuration as one. A short one is no median that ignores a pause: beside
        a much longer one it does not count."""
        total = self.steps + later.steps
        off = (self.off * self.steps + later.off * later.steps) / total
        if max(self.steps, later.steps) > 2 * min(self.steps, later.steps):
            off = max(self, later, key=lambda block: block.steps).off
        return self._replace(off=off, steps=total, end=later.end)


class Posterior(NamedTuple):
    """What is known of the state: the machine now, then the misses of the configurations that ran."""

    mean: Floats
    covariance: Floats
    inverse: Floats
    """Inverse of the prior covariance of the prediction errors."""
    excess: float
    """Squared misses over what they were assumed to be, at least 1."""
    drift: float
    """Standard deviation of the machine over the run."""


class _Rows(NamedTuple):
    """B blocks as arrays; L of them are steps, the others comparisons."""

    off: Floats
    """Logarithms of seen ÷ predicted."""
    live: NDArray[np.bool_]
    """Which are steps."""
    design: Floats
    """What each is the sum of, B × (L + 1 + configurations): the machine at that time (now last), and misses."""
    noise: Floats
    """Variances of their noise, (B,)."""
    steps: Floats
    """Steps in each of the L, (L,)."""
    apart: Floats
    """Mean steps from the middle of one of the L to the middle of the next, and from the last to now, (L,)."""

    @classmethod
    def of(cls, blocks: list[Block], size: int, noise: float, mean_step_seconds: float) -> "_Rows":
        """The arrays of some blocks about so many configurations."""
        place, versus, off, steps, start, end, error = np.array(blocks, dtype=float).reshape(-1, 7).T
        live = versus < 0
        number = int(live.sum()) + 1
        design = np.zeros((len(blocks), number + size))
        design[live, np.arange(number - 1)] = 1.0
        design[np.arange(len(blocks)), number + place.astype(int)] = 1.0
        design[~live, number + versus[~live].astype(int)] -= 1.0
        # The median of n values has π/2 of the variance of their mean.
        own = noise**2 * np.where(steps > 2, math.pi / 2, 1.0) / steps
        middle = np.append((start + end)[live] / 2, end.max(initial=0.0)) / mean_step_seconds
        return cls(off, live, design, np.where(live, own, error**2), steps[live], np.maximum(np.diff(middle), 1.0))


def regress(
    blocks: list[Block], noise: float, mean_step_seconds: float, prior: Floats, run: float, expected_drift: float
) -> Posterior:
    """The posterior of the state.

    `noise` is the standard deviation of a step, `prior` the covariance of the misses, `run` the standard deviation of
    what the whole run differs by from the predictions, `expected_drift` that of the machine's drift; all are of
    logarithms.
    """
    rows = _Rows.of(blocks, len(prior), noise, mean_step_seconds)
    number, size = len(rows.apart) + 1, len(prior)
    inverse: Floats = np.asarray(np.linalg.inv(prior), np.float64)
    changes = np.diff(np.eye(number), axis=0)
    excess, wander = 1.0, WANDER**2
    weights, calm = np.ones(len(rows.off)), np.ones(number - 1)
    if number > 2:  # begin with a machine that follows every step: what does not move is then found to be calm
        wander = max(wander, float(np.mean(np.diff(rows.off[rows.live]) ** 2 / rows.apart[:-1])))
    for _ in range(ROUNDS):
        information = (rows.design.T * (weights / rows.noise)) @ rows.design
        information[:number, :number] += (changes.T * (calm / (wander * rows.apart))) @ changes
        information[0, 0] += 1 / run**2
        information[number:, number:] += inverse / excess
        covariance: Floats = np.asarray(np.linalg.inv(information), np.float64)
        mean: Floats = covariance @ (rows.design.T @ (weights / rows.noise * rows.off))
        misfit = (rows.off - rows.design @ mean) ** 2 + _quadratic(rows.design, covariance)
        weights = (TAIL + 1) / (TAIL + misfit / rows.noise)
        machine = mean[:number]
        moved = (np.diff(machine) ** 2 + _quadratic(changes, covariance[:number, :number])) / rows.apart
        calm = (JUMPS + 1) / (JUMPS + moved / wander)
        wander = float((WANDER_WEIGHT * WANDER**2 + (calm * moved).sum()) / (WANDER_WEIGHT + len(moved)))
        misses, left = mean[number:], covariance[number:, number:]
        squares = float(misses @ inverse @ misses + np.sum(inverse * left))
        excess = max(1.0, (FREEDOM + squares) / (FREEDOM + size))
    spread = float(np.cov(machine[:-1], aweights=rows.steps, ddof=0)) if number > 1 else 0.0
    drift = math.sqrt((DRIFT_WEIGHT * expected_drift**2 + (number - 1) * spread) / (DRIFT_WEIGHT + number - 1))
    return Posterior(mean[number - 1 :], covariance[number - 1 :, number - 1 :], inverse, excess, drift)


def _quadratic(rows: Floats, matrix: Floats) -> Floats:
    """rᵀ · matrix · r for every row r."""
    return np.asarray(np.einsum("ij,ij->i", rows @ matrix, rows))
