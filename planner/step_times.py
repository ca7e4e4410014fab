"""How long a step takes in each configuration of a run, told apart from the state that the machine was in."""

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from scipy.linalg import cho_solve, cholesky

from planner.menu import Floats, Indices

MOST_BLOCKS = 200
"""Blocks of steps that the fit looks at: its time grows with their third power, and 200 take a fifth of a second."""
MACHINE = (0.03, 0.1, 0.3)
"""Standard deviations of each part of the machine's state (of the logarithm of a step time) that the fit chooses from,
beside 0."""
BURST = (0.003, 0.01, 0.03)
"""Correlation times of the quick part, as shares of the run: other tenants come and go."""
DRIFT = (0.1, 1.0)
"""Correlation times of the slow part, as shares of the run: heat, the hour of the day."""
NOISE = (1.0, 2.0)
"""Errors of a block that it chooses from, as multiples of what the differences of successive steps make them."""
LEAST_NOISE = 0.003
"""Standard deviation of the logarithm of a step, at least."""
MEDIAN = 1.2533
"""Standard error of a median over that of a mean, for normal errors."""


@dataclass(frozen=True)
class StepTimes:
    """Logarithms of step seconds, of configurations that ran: their posterior is normal."""

    mean: Floats
    """Shape (C,)."""
    covariance: Floats
    """Shape (C, C). What all have in common, the mean state of the machine, cancels in a ratio of two."""
    bursts: float
    """Standard deviation of the logarithm of the quick part of the machine's state."""
    drift: float
    """The same of the slow part."""


def fit_step_times(configuration: Indices, seconds: Floats, at: Floats) -> StepTimes:
    """Fit log seconds = configuration + machine(t) + noise to the steps of a run.

    `configuration` (numbers from 0, each at least once), `seconds` and the times `at` which steps ended have the shape
    (N,), in order. The machine's state is the sum of two Ornstein-Uhlenbeck processes with mean 0, a slow and a quick
    one, so that a busy episode does not make the configurations slow that happened to run in it: they are compared with
    what ran just before and after, as far as the state lasts, and through their means, as far as it does not. Steps are
    taken together in blocks, each of which counts by its median: a step that stalls moves nothing. How much and how
    slowly the machine wanders is what makes the data most likely (restricted maximum likelihood).
    """
    blocks = _blocks(configuration)
    logs = np.log(seconds)
    value = np.array([np.median(logs[a:b]) for a, b in pairwise(blocks)])
    middle = np.array([np.mean(at[a:b]) for a, b in pairwise(blocks)])
    error = MEDIAN * _step_noise(configuration, logs) / np.sqrt(np.diff(blocks))
    design = (configuration[blocks[:-1], None] == np.arange(configuration.max() + 1)).astype(float)
    apart = np.abs(middle[:, None] - middle) / max(float(at[-1] - at[0]), float(seconds.sum()))
    quick, slow = (
        [(0.0, np.zeros_like(apart)), *((sd, sd**2 * np.exp(-apart / memory)) for memory in memories for sd in MACHINE)]
        for memories in (BURST, DRIFT)
    )
    best: tuple[float, StepTimes] | None = None
    for noise, (bursts, one), (drift, other) in product(NOISE, quick, slow):
        likelihood, mean, spread = _generalized_least_squares(
            one + other + np.diag((noise * error) ** 2), design, value
        )
        if best is None or likelihood > best[0]:
            best = likelihood, StepTimes(mean, spread, bursts, drift)
    assert best is not None, "the grid is not empty"
    return best[1]


def _blocks(configuration: Indices) -> Indices:
    """Where blocks begin, and the end: runs of one configuration, cut into pieces of about the same length."""
    count = len(configuration)
    ends = np.flatnonzero(np.diff(configuration)) + 1
    spans = np.concatenate([[0], ends, [count]])
    target = max(1, -(-count // MOST_BLOCKS))
    starts = [np.linspace(a, b, -(-(b - a) // target), endpoint=False) for a, b in pairwise(spans)]
    return np.append(np.concatenate(starts).astype(np.int64), count)


def _step_noise(configuration: Indices, logs: Floats) -> float:
    """Standard deviation of the logarithm of a step, from how much successive steps of a configuration differ."""
    jumps = np.abs(np.diff(logs))[np.diff(configuration) == 0]
    return max(float(np.median(jumps)) / (0.6745 * np.sqrt(2)), LEAST_NOISE) if len(jumps) else 0.1


def _generalized_least_squares(covariance: Floats, design: Floats, value: Floats) -> tuple[float, Floats, Floats]:
    """The restricted log likelihood, and the coefficients with their covariance."""
    factor = cholesky(covariance, lower=True, check_finite=False)
    weighted = cho_solve((factor, True), design, check_finite=False)
    precision = design.T @ weighted
    spread = np.linalg.inv(precision)
    mean = spread @ (weighted.T @ value)
    left = value - design @ mean
    likelihood = -np.log(np.diag(factor)).sum() - 0.5 * np.linalg.slogdet(precision)[1]
    likelihood -= 0.5 * left @ cho_solve((factor, True), left, check_finite=False)
    return float(likelihood), mean, spread
