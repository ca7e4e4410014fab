"""A power law of the noise scale in tokens, fitted while the job runs: what the critical batch will be later."""

import math
from typing import Any

import numpy as np
from scipy.special import stdtrit

from profiles.forecast import Forecast
from profiles.noise_scale import NoiseScale

CONFIDENCE = 0.90
MAX_POINTS = 64
"""When there are more, every second one is dropped and the distance between new ones doubled."""
SMALLEST_ERROR = 0.02
"""No noise scale is better known than to 2 %."""
UNKNOWN_ERROR = 0.7
"""Standard error of the logarithm where a noise scale came without an interval: a factor of two."""
EXPONENT_SPREAD = 0.75
"""Before anything is seen, α is 0 ± this. Measured critical batches grow with exponents of some 0.5 (2410.21676,
2505.13738) and less late in training (2505.23971)."""


class NoiseForecast:
    """Fits log B_simple = log A + α·log tokens by weighted least squares (weights: the interval of each noise scale).

    The noise scales come smoothed, so that neighbours are nearly the same figure: only points at least
    `spacing_tokens` apart are taken, the half-life of the smoothing. α has a prior, 0 ± 0.75, so that one point means a
    constant with an interval that widens with distance, and a few points cannot run away. Where the points scatter more
    than their own intervals say, all errors are scaled up by the excess (Birge). The state is at most 64 points.
    """

    def __init__(self, spacing_tokens: float) -> None:
        if spacing_tokens <= 0:
            raise ValueError(f"spacing_tokens({spacing_tokens}) has to be positive")
        self._spacing = float(spacing_tokens)
        # Rows of: tokens, log B_simple, its standard error.
        self._points: list[list[float]] = []

    def observe(self, tokens: float, noise: NoiseScale) -> None:
        """Take in the noise scale after `tokens` tokens; nothing happens where it is unknown or too near the last."""
        value = noise.value
        if value is None or not 0 < value < math.inf or tokens <= 0:
            return
        if self._points and tokens < self._points[-1][0] + self._spacing:
            return
        self._points.append([float(tokens), math.log(value), _log_error(noise)])
        if len(self._points) > MAX_POINTS:
            self._points = self._points[::2]
            self._spacing *= 2

    def at(self, tokens: float) -> Forecast | None:
        """The noise scale expected at `tokens` tokens of the job, with the 90 % interval of an estimate made there.

        None before the first point. Raises ValueError unless `tokens` is positive.
        """
        if tokens <= 0:
            raise ValueError(f"tokens({tokens}) has to be positive")
        if not self._points:
            return None
        seen, y, error = np.array(self._points).T
        x = np.log(seen)
        centre = float(np.average(x, weights=error**-2))
        coefficients, covariance, excess = _fit(x - centre, y, error)
        quantile = float(stdtrit(max(len(x) - 1, 1), 0.5 + CONFIDENCE / 2))
        row = np.array([1.0, math.log(tokens) - centre])
        middle = float(row @ coefficients)
        half_width = quantile * math.sqrt(float(row @ covariance @ row) + excess * float(np.median(error)) ** 2)
        alpha, alpha_half = float(coefficients[1]), quantile * math.sqrt(float(covariance[1, 1]))
        return Forecast(
            tokens=tokens,
            value=_exp(middle),
            low=_exp(middle - half_width),
            high=_exp(middle + half_width),
            exponent=alpha,
            exponent_low=alpha - alpha_half,
            exponent_high=alpha + alpha_half,
            points=len(x),
        )

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {"spacing_tokens": self._spacing, "points": self._points}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        if state:
            self._spacing = state["spacing_tokens"]
            self._points = [list(point) for point in state["points"]]


def _fit(x: np.ndarray, y: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(log A, α), their covariance, and by how much squared errors exceed what the points' own intervals say (≥ 1)."""
    design = np.stack([np.ones_like(x), x], axis=1)
    prior = np.diag([0.0, EXPONENT_SPREAD**-2])
    excess = 1.0
    for _ in range(2):
        weights = error**-2 / excess
        covariance = np.linalg.inv(design.T @ (weights[:, None] * design) + prior)
        coefficients = covariance @ design.T @ (weights * y)
        if len(x) > 2:
            squares = (y - design @ coefficients) ** 2 / error**2
            excess = max(1.0, float(squares.sum()) / (len(x) - 2))
    return coefficients, covariance, excess


def _log_error(noise: NoiseScale) -> float:
    """Standard error of log B_simple, from the 90 % interval; one-sided where that is open."""
    if noise.value is None or noise.low is None or noise.low <= 0:
        return UNKNOWN_ERROR
    quantile = float(stdtrit(100.0, 0.5 + CONFIDENCE / 2))
    if noise.high is None or not math.isfinite(noise.high):
        return max(math.log(noise.value / noise.low) / quantile, UNKNOWN_ERROR)
    return max(math.log(noise.high / noise.low) / (2 * quantile), SMALLEST_ERROR)


def _exp(value: float) -> float:
    return math.exp(min(max(value, -700.0), 700.0))
