"""How wrong the cost model's predictions may be, and how alike: most of it is shared."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from profiles.cost.residual import Smoothness, covariance, covariance_of_pairs, variance
from profiles.cost.work import Floats

ALL = slice(None)
SMALLEST_VARIANCE = 1e-8
"""Least variance of a prediction, so that rounding never makes one certain."""


@dataclass(frozen=True)
class Errors:
    """The logarithms of how wrong N predictions are, noise of a measurement left out: jointly normal."""

    how: Smoothness
    """What is believed of the misses."""
    jacobian: Floats
    """What the constants do to them: N × constants."""
    places: Floats
    """Where they lie: N × D, as in `profiles.cost.residual`."""
    spread: float
    """How many times as large as believed they are, as the rows of the fit tell."""
    freedom: float
    """Degrees of freedom of their Student distribution: how sure that is."""
    across: Floats | None = None
    """Covariances with the rows of the fit: N × rows."""
    solved: Floats | None = None
    """The rows' covariance⁻¹ · `across`ᵀ: rows × N."""

    def half_widths(self, coverage: float) -> Floats:
        """Half-width of the interval that holds a share `coverage` of measured times with noise, as logarithms: N."""
        return self.widening(coverage) * np.sqrt(self.variance() + self.how.noise_sd**2)

    def widening(self, coverage: float) -> float:
        """Interval half-width in prior standard deviations."""
        return float(stdtrit(self.freedom, 0.5 + coverage / 2)) * self.spread

    def variance(self) -> Floats:
        """Variance of each prediction: N."""
        total: Floats = (self.jacobian * self.jacobian).sum(1) + variance(self.how)
        if self.across is not None and self.solved is not None:
            total = total - np.einsum("ij,ji->i", self.across, self.solved)
        return np.maximum(total, SMALLEST_VARIANCE)

    def covariance(self, some: slice = ALL) -> Floats:
        """Covariance of all predictions with some of them: N × M."""
        total: Floats = self.jacobian @ self.jacobian[some].T + covariance(self.places, self.places[some], self.how)
        if self.across is not None and self.solved is not None:
            total -= self.across @ self.solved[:, some]
        return total

    def of_ratios(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> Floats:
        """Standard deviations of the logarithms of P ratios of two of them, given by their places: most of what
        predictions are wrong by is shared, and cancels."""
        moved = self.jacobian[one] - self.jacobian[other]
        total: Floats = (moved * moved).sum(1)
        total = total + 2 * (variance(self.how) - covariance_of_pairs(self.places[one], self.places[other], self.how))
        if self.across is not None and self.solved is not None:
            total = total - (
                (self.across[one] - self.across[other]) * (self.solved[:, one] - self.solved[:, other]).T
            ).sum(1)
        return self.spread * np.sqrt(np.maximum(total, 0.0))
