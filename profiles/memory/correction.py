"""What observed peaks say about the formulas: a factor for each group of parts, what lies beside them, and what the
neighbours of a configuration were seen to take."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import least_squares

from profiles.memory.components import COMPONENTS, stage_components
from profiles.memory.implementation import Implementation
from profiles.memory.neighbours import SHAPE_SD, coordinates, covariance
from profiles.memory.parameters import STAGES, Floats, Stage
from profiles.memory.peaks import OUTSIDE_BYTES, Peaks

GROUPS: dict[str, tuple[str, ...]] = {
    "state": ("weights", "gradients", "optimizer"),
    "activations": ("activations", "working"),
    "logits": ("logits",),
    "buffers": ("communication", "allocator"),
}
"""Parts that share a factor: they are wrong together."""
BESIDE_BYTES = 0.5 * 2**30
"""One standard deviation of the bytes beside the formulas (contexts, communicators), which are not negative."""
PRIOR_SD = np.array([0.10, 0.25, 0.25, 0.50, 1.0])
"""Of the logarithm of each group's factor, and of what lies beside in units of `BESIDE_BYTES`. Weights can be counted;
how many copies a framework keeps of activations and logits cannot."""
NOISE_SD = 0.07
"""Standard deviation of the logarithm of a repeated peak."""
FREEDOM = 10.0
"""Rows that these beliefs count for, when rows say that errors are larger or smaller."""
ROBUST = 3.0
"""Standard deviations beyond which a row counts less and less (soft L1)."""
DIFFERENCE = 1.5
"""Log odds against every way in which the framework differs from what was assumed."""
MOST_ROWS = 500
"""Most rows that are fitted; of more, evenly spaced ones are taken."""


@dataclass(frozen=True)
class _Rows:
    """What is kept of the rows of a fit, N of them."""

    places: Floats
    slopes: Floats
    solved: Floats
    whole: Any


@dataclass(frozen=True)
class Correction:
    """Nothing by default: the formulas alone."""

    parameters: Floats = field(default_factory=lambda: np.zeros(len(PRIOR_SD)))
    """Log factors of `GROUPS`, and what lies beside in units of `BESIDE_BYTES`."""
    spread: float = 1.0
    """Factor by which all standard deviations exceed the priors'."""
    freedom: float = FREEDOM
    """Degrees of freedom of the Student distribution of a peak's logarithm."""
    count: int = 0
    """Observations that it was learned from."""
    rows: _Rows | None = None
    """What is left of them."""

    def factor(self, component: str) -> float:
        """Factor of one part."""
        group = next(index for index, members in enumerate(GROUPS.values()) if component in members)
        return float(np.exp(self.parameters[group]))

    @property
    def beside_bytes(self) -> float:
        """Bytes beside the formulas."""
        return float(self.parameters[-1]) * BESIDE_BYTES

    def nearby(self, places: Floats) -> Floats:
        """Measured ÷ predicted memory, interpolated from nearby rows."""
        if self.rows is None:
            return np.ones(len(places))
        return np.asarray(np.exp(covariance(places, self.rows.places) @ self.rows.solved), dtype=np.float64)

    def log_sd(self, groups: Floats, places: Floats) -> Floats:
        """Standard deviation of the logarithm of a peak that is measured, for 5 × N groups."""
        total, slopes = corrected(groups, self.parameters)
        # What lies beside is only ever added: far beyond the rest it moves the logarithm by less than its slope says.
        slopes[:, -1] = np.log1p(groups[-1] / total)
        own = slopes * PRIOR_SD
        variance = (own * own).sum(1) + SHAPE_SD**2 + NOISE_SD**2
        if self.rows is not None:
            cross = own @ self.rows.slopes.T + covariance(places, self.rows.places)
            variance = variance - np.einsum("ij,ji->i", cross, cho_solve(self.rows.whole, cross.T))
        return self.spread * np.sqrt(np.maximum(variance, NOISE_SD**2))


def grouped(components: dict[str, Floats]) -> Floats:
    """Bytes of each of `GROUPS`, and one unit of what lies beside them: 5 × N."""
    assert set(components) == set(COMPONENTS)
    sums = [np.add.reduce([components[name] for name in members]) for members in GROUPS.values()]
    return np.stack([*sums, np.full_like(sums[0], BESIDE_BYTES)])


def corrected(groups: Floats, parameters: Floats) -> tuple[Floats, Floats]:
    """(bytes, ∂ log bytes / ∂ parameters as N × 5) of 5 × N groups."""
    parts = groups * np.append(np.exp(parameters[:-1]), parameters[-1])[:, None]
    total = parts.sum(axis=0)
    slopes = parts / total
    slopes[-1] = groups[-1] / total
    return total, slopes.T


def learn(peaks: Sequence[Peaks], assumed: Implementation) -> tuple[Implementation, Correction]:
    """The most likely way that the framework is written, and the correction that goes with it.

    Maximum of the posterior: robust least squares of the logarithms' errors, which are alike for neighbours, with the
    factors' priors. The work is one small fit for each alternative.
    """
    informative = [_evenly(group, peaks) for group in peaks if len(group.configurations)]
    if not informative:
        return assumed, Correction()
    seen = _Seen(informative)
    problems = [(_Problem(seen, how), DIFFERENCE * differences) for how, differences in assumed.alternatives()]
    best, _ = min(problems, key=lambda problem: problem[0].cost + problem[1])
    return best.how, best.correction()


def _evenly(group: Peaks, peaks: Sequence[Peaks]) -> Peaks:
    total = sum(len(one.configurations) for one in peaks)
    own = len(group.configurations)
    share = max(1, own * MOST_ROWS // total)
    return group if total <= MOST_ROWS else group.take(np.linspace(0, own - 1, share).round().astype(np.int64))


class _Seen:
    """Observations, and how alike they are."""

    def __init__(self, peaks: Sequence[Peaks]) -> None:
        self.peaks = peaks
        at_least = np.concatenate([group.at_least_bytes for group in peaks])
        self.failed = np.isfinite(at_least)
        bytes_ = np.concatenate([group.peak_bytes for group in peaks])
        self.target = np.log(np.where(self.failed, np.maximum(at_least - OUTSIDE_BYTES, 1.0), bytes_))
        self.places = np.concatenate([coordinates(group.model, group.configurations) for group in peaks])
        self.noisy = covariance(self.places, self.places) + NOISE_SD**2 * np.eye(len(self.target))

    def groups(self, how: Implementation, stage: Stage) -> Floats:
        """5 × N, by an implementation."""
        components = [stage_components(p.model, p.configurations, p.precision, how, stage) for p in self.peaks]
        return np.concatenate([grouped(part) for part in components], axis=1)


class _Problem:
    """Factors for one implementation, fitted."""

    def __init__(self, seen: _Seen, how: Implementation) -> None:
        self.how = how
        self._seen = seen
        self._stages = [seen.groups(how, stage) for stage in STAGES]
        # A failure says something only where the peak that is expected would have fitted.
        start = np.zeros(len(PRIOR_SD))
        self._heard = ~seen.failed | (self._errors(start)[0] > 0)
        self._lower = np.linalg.cholesky(seen.noisy[np.ix_(self._heard, self._heard)])
        self.z = self._fit()
        rest = self._white(self._errors(self.z * PRIOR_SD)[0][self._heard])
        self.misfit = float(np.minimum(rest**2, ROBUST**2).sum() + self.z @ self.z)
        self.cost = (FREEDOM + len(rest)) / 2 * float(np.log1p(self.misfit / FREEDOM))

    def _errors(self, parameters: Floats) -> tuple[Floats, Floats]:
        """Logarithms of what was seen over what is expected, N, and slopes of the latter, N × 5."""
        totals, slopes = map(np.stack, zip(*(corrected(stage, parameters) for stage in self._stages), strict=True))
        fullest, rows = totals.argmax(axis=0), np.arange(totals.shape[1])
        return self._seen.target - np.log(totals[fullest, rows]), slopes[fullest, rows]

    def _white(self, values: Floats) -> Floats:
        """Made independent, and in standard deviations."""
        return np.asarray(solve_triangular(self._lower, values, lower=True, check_finite=False), dtype=np.float64)

    def _fit(self) -> Floats:
        """Parameters in units of their priors."""

        def misses(z: Floats) -> Floats:
            return np.concatenate([self._white(self._errors(z * PRIOR_SD)[0][self._heard]), z])

        def slopes(z: Floats) -> Floats:
            own = self._errors(z * PRIOR_SD)[1][self._heard] * PRIOR_SD
            return np.concatenate([-self._white(own), np.eye(len(z))])

        bounds = (np.array([-np.inf] * (len(PRIOR_SD) - 1) + [0.0]), np.full(len(PRIOR_SD), np.inf))
        start = np.append(np.zeros(len(PRIOR_SD) - 1), 0.1)
        best = least_squares(misses, start, jac=slopes, bounds=bounds, loss="soft_l1", f_scale=ROBUST, max_nfev=50)
        return np.asarray(best.x, dtype=np.float64)

    def correction(self) -> Correction:
        """With what neighbours add, and how sure everything is."""
        heard, seen = self._heard, self._seen
        errors, slopes = (values[heard] for values in self._errors(self.z * PRIOR_SD))
        own = slopes * PRIOR_SD
        noisy = seen.noisy[np.ix_(heard, heard)].copy()
        # A row that is far off has a noise of its own size: its neighbours do not follow it.
        wild = np.abs(self._white(errors)) > ROBUST
        noisy[wild, wild] += errors[wild] ** 2
        solved = cho_solve(cho_factor(noisy), errors)
        count = len(errors)
        spread = float(np.sqrt((FREEDOM + self.misfit) / (FREEDOM + count)))
        rows = _Rows(seen.places[heard], own, solved, cho_factor(noisy + own @ own.T))
        return Correction(self.z * PRIOR_SD, spread, FREEDOM + count, len(seen.target), rows)
