"""What observed peaks say about the formulas: a factor for each group of components, and what lies beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from profiles.memory.components import COMPONENTS, stage_components
from profiles.memory.implementation import Implementation
from profiles.memory.parameters import Floats
from profiles.memory.peaks import OUTSIDE_BYTES, Peaks

GROUPS: dict[str, tuple[str, ...]] = {
    "state": ("weights", "gradients", "optimizer"),
    "activations": ("activations", "working"),
    "logits": ("logits",),
    "buffers": ("communication", "allocator"),
}
"""Components that share a factor: they are wrong together."""
PRIOR_SD = np.array([0.10, 0.25, 0.25, 0.50])
"""Of the logarithm of each group's factor. Weights are counted, how many copies a framework keeps of them is not."""
BESIDE_SD = 1.5 * 2**30
"""Of what lies beside the formulas (contexts, communicators), bytes; it is not negative."""
NOISE_SD = 0.10
"""Of the logarithm of a peak that the factors cannot explain; replaced by what the rows show as they become many."""
NOISE_WEIGHT = 4.0
"""Rows that `NOISE_SD` counts for."""
ROBUST = 3.0
"""Standard deviations beyond which a row counts less and less (soft L1)."""
DIFFERENCE = 1.5
"""Log odds against every way in which the framework differs from what was assumed."""


@dataclass(frozen=True)
class Correction:
    """Log factors of `GROUPS` and bytes ÷ `BESIDE_SD` beside them, with the uncertainty of all."""

    mean: Floats
    """Of the groups, then of what lies beside."""
    covariance: NDArray[np.float64]
    """Of the same."""
    noise_sd: float = NOISE_SD
    """Of the logarithm of a peak, beside that."""
    freedom: float = NOISE_WEIGHT
    """Degrees of freedom of the Student distribution of a peak's logarithm."""
    rows: int = 0
    """Observations that it was learned from."""

    @classmethod
    def prior(cls) -> "Correction":
        """What is believed before anything was seen."""
        return cls(np.zeros(len(PRIOR_SD) + 1), np.diag([*PRIOR_SD**2, 0.1]))

    def factor(self, component: str) -> float:
        """Of one component."""
        group = next(index for index, members in enumerate(GROUPS.values()) if component in members)
        return float(np.exp(self.mean[group]))

    @property
    def beside_bytes(self) -> float:
        """What lies beside the formulas."""
        return float(self.mean[-1]) * BESIDE_SD


def grouped(found: dict[str, Floats]) -> Floats:
    """Bytes of each of `GROUPS`, and of one unit of what lies beside them: 5 × N."""
    assert set(found) == set(COMPONENTS)
    sums = [np.add.reduce([found[name] for name in members]) for members in GROUPS.values()]
    return np.stack([*sums, np.full_like(sums[0], BESIDE_SD)])


def corrected(groups: Floats, parameters: Floats) -> tuple[Floats, Floats]:
    """(bytes, ∂ log bytes / ∂ parameters) of 5 × N groups."""
    parts = groups * np.append(np.exp(parameters[:-1]), parameters[-1])[:, None]
    total = parts.sum(axis=0)
    slopes = parts / total
    slopes[-1] = groups[-1] / total
    return total, slopes


def log_variance(groups: Floats, correction: Correction) -> Floats:
    """Variance of the logarithm of a peak that is measured, for 5 × N groups."""
    total, slopes = corrected(groups, correction.mean)
    # What lies beside is only ever added: far beyond the rest it moves the logarithm by less than its slope says.
    slopes[-1] = np.log1p(groups[-1] / total)
    return np.asarray(np.einsum("in,ij,jn->n", slopes, correction.covariance, slopes) + correction.noise_sd**2)


def learn(peaks: Sequence[Peaks], assumed: Implementation) -> tuple[Implementation, Correction]:
    """The most likely way that the framework is written, and the factors that go with it.

    Robust least squares of the logarithms' errors; the prior keeps what the rows do not tell. A row that ran out of
    memory only pulls a prediction up that says it would have fitted. The work is one small fit for each alternative.
    """
    known = [each for each in peaks if len(each.configurations)]
    if not known:
        return assumed, Correction.prior()
    problems = [(_Problem(known, how), differences) for how, differences in assumed.alternatives()]
    costs = [problem.fit(NOISE_SD)[0] + DIFFERENCE * differences for problem, differences in problems]
    best = problems[int(np.argmin(costs))][0]
    return best.how, best.fit(best.fit(NOISE_SD)[1].noise_sd)[1]


class _Problem:
    """Observations, and what an implementation makes of their configurations."""

    def __init__(self, peaks: Sequence[Peaks], how: Implementation) -> None:
        self.how = how
        self._stages = [
            np.concatenate(
                [
                    grouped(stage_components(each.model, each.configurations, each.precision, how, last=last))
                    for each in peaks
                ],
                axis=1,
            )
            for last in (False, True)
        ]
        at_least = np.concatenate([each.at_least_bytes for each in peaks])
        self._failed = np.isfinite(at_least)
        seen = np.concatenate([each.peak_bytes for each in peaks])
        self._target = np.log(np.where(self._failed, np.maximum(at_least - OUTSIDE_BYTES, 1.0), seen))

    def fit(self, noise_sd: float) -> tuple[float, Correction]:
        """(minus the logarithm of the likelihood, correction), for rows that are believed to be so noisy."""
        sd = np.append(PRIOR_SD, 1.0)
        best = least_squares(
            lambda z: np.concatenate([self._errors(z * sd)[0] / noise_sd, z]),
            np.append(np.zeros(len(PRIOR_SD)), 0.1),
            jac=lambda z: np.concatenate([self._errors(z * sd)[1] * sd / noise_sd, np.eye(len(sd))]),
            bounds=(np.append(np.full(len(PRIOR_SD), -np.inf), 0.0), np.full(len(sd), np.inf)),
            loss="soft_l1",
            f_scale=ROBUST,
            max_nfev=50,
        )
        errors, slopes = self._errors(best.x * sd)
        count = int((~self._failed).sum())
        typical = 1.4826 * float(np.median(np.abs(errors[~self._failed]))) if count else 0.0
        squares = float(np.minimum(errors**2, (ROBUST * max(NOISE_SD, typical)) ** 2).sum())
        freedom = NOISE_WEIGHT + count
        noise = float(np.sqrt((NOISE_WEIGHT * NOISE_SD**2 + squares) / freedom))
        information = slopes.T @ slopes / noise**2 + np.diag(1 / sd**2)
        found = Correction(best.x * sd, np.asarray(np.linalg.inv(information), float), noise, freedom, len(errors))
        # The noise is not known beforehand either: integrated out, errors are Student's.
        cost = freedom / 2 * np.log1p(squares / (NOISE_WEIGHT * NOISE_SD**2)) + best.x @ best.x / 2
        return float(cost), found

    def _errors(self, parameters: Floats) -> tuple[Floats, Floats]:
        """Errors of the logarithms, N, and their slopes, N × 5. A failure that was foreseen is no error."""
        (first, first_slopes), (end, end_slopes) = (corrected(stage, parameters) for stage in self._stages)
        later = end > first
        errors = np.log(np.where(later, end, first)) - self._target
        slopes = np.where(later, end_slopes, first_slopes).T
        quiet = self._failed & (errors > 0)
        return np.where(quiet, 0, errors), np.where(quiet[:, None], 0, slopes)
