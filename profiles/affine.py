"""The line step_seconds = fixed_seconds + microbatch_seconds · num_microbatches, fitted to measurements."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A measured step time."""

    num_microbatches: int
    """Micro-batches that each replica ran."""
    step_seconds: float
    """Duration of the step."""
    error_seconds: float
    """Its standard error."""


class AffineFit(NamedTuple):
    """A fitted line, with the errors that its predictions inherit from the points."""

    fixed_seconds: float
    """Part of the step that does not depend on the number of micro-batches (optimizer, reduction, pipeline bubble)."""
    microbatch_seconds: float
    """Time of one more micro-batch."""
    variance_fixed: float
    """Variance of `fixed_seconds`, seconds²."""
    variance_microbatch: float
    """Variance of `microbatch_seconds`, seconds²."""
    covariance: float
    """Covariance of the two, seconds²."""
    misfit: float
    """Root mean square of the points' relative distance from the line; 0 if it passes through them."""

    def step_seconds(self, num_microbatches: int) -> float:
        """Duration of a step of that many micro-batches."""
        return self.fixed_seconds + self.microbatch_seconds * num_microbatches

    def error_seconds(self, num_microbatches: int) -> float:
        """Standard error: the points' errors carried through the fit, and their distance from it."""
        n = num_microbatches
        variance = self.variance_fixed + 2 * n * self.covariance + n * n * self.variance_microbatch
        return math.hypot(math.sqrt(max(variance, 0.0)), self.misfit * self.step_seconds(n))


def fit_affine(points: Sequence[Point]) -> AffineFit:
    """Least squares of the relative errors, under fixed_seconds ≥ 0 and microbatch_seconds > 0.

    Why a line: gradient accumulation repeats a micro-batch n times, and a 1F1B pipeline takes n + pp − 1 turns
    (Megatron-LM, 2104.04473, §2.2.1), so both are affine in n. Relative errors: timing noise grows with the time, and
    spreads of a few steps are too rough to weight by. Where the free line breaks a bound, the line through the origin
    is taken: times that fall with n are noise, and must not promise ever more throughput to larger counts.

    Raises ValueError with fewer than two distinct counts.
    """
    counts = [point.num_microbatches for point in points]
    seconds = [point.step_seconds for point in points]
    if len(set(counts)) < 2:
        raise ValueError(f"a line needs two distinct numbers of micro-batches, got {sorted(set(counts))}")
    weights = [(min(seconds) / t) ** 2 for t in seconds]
    total = sum(weights)
    mean = sum(w * n for w, n in zip(weights, counts, strict=True)) / total
    variance = sum(w * (n - mean) ** 2 for w, n in zip(weights, counts, strict=True))
    # Both coefficients are linear in the times: fixed = Σ to_fixed·t, microbatch = Σ to_microbatch·t.
    to_microbatch = [w * (n - mean) / variance for w, n in zip(weights, counts, strict=True)]
    to_fixed = [w / total - mean * slope for w, slope in zip(weights, to_microbatch, strict=True)]
    if _dot(to_fixed, seconds) < 0 or _dot(to_microbatch, seconds) <= 0:
        squares = sum(w * n * n for w, n in zip(weights, counts, strict=True))
        to_microbatch = [w * n / squares for w, n in zip(weights, counts, strict=True)]
        to_fixed = [0.0] * len(points)
    fixed, microbatch = _dot(to_fixed, seconds), _dot(to_microbatch, seconds)
    errors = [point.error_seconds for point in points]
    carried_fixed = [share * s for share, s in zip(to_fixed, errors, strict=True)]
    carried_microbatch = [share * s for share, s in zip(to_microbatch, errors, strict=True)]
    misses = [(fixed + microbatch * n) / t - 1 for n, t in zip(counts, seconds, strict=True)]
    return AffineFit(
        fixed_seconds=fixed,
        microbatch_seconds=microbatch,
        variance_fixed=_dot(carried_fixed, carried_fixed),
        variance_microbatch=_dot(carried_microbatch, carried_microbatch),
        covariance=_dot(carried_fixed, carried_microbatch),
        misfit=math.sqrt(_dot(misses, misses) / len(misses)),
    )


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
