"""How the noise scale of the norm layers compares with that of the whole gradient."""

import math
from dataclasses import dataclass

import numpy as np

from copus.noise.estimator import MIN_BLOCKS, effective_blocks, residuals, student_t
from copus.noise.memory import Blocks, Clock
from copus.noise.step_estimate import StepEstimate
from profiles.noise_scale import NoiseScale

HALF_LIVES = 8
"""κ changes slowly (Gray et al. 2024, fig. 7): it is averaged over this many half-lives of the noise scale itself."""
MAX_RELATIVE_ERROR = 0.5
"""Standard error of log κ above which κ is not used."""


@dataclass(frozen=True)
class Factors:
    """What the norm layers' figures are multiplied by to get those of the whole gradient."""

    grad_sq: float
    """For |G|²."""
    noise_trace: float
    """For tr Σ."""
    log_half_width: float
    """Half-width of the 90 % interval of log κ."""

    @property
    def kappa(self) -> float:
        """κ, for the noise scale."""
        return self.noise_trace / self.grad_sq


class NormLayerCalibration:
    """κ = B_simple / B_norm, from the steps that measured both.

    Both ratios are taken over the same steps, so that what those steps have in common cancels. The error of log κ is
    the jackknife's over blocks of such steps.
    """

    def __init__(self) -> None:
        # Σ weight and Σ weight·value, of |G|² and tr Σ: of the whole gradient, then of the norm layers.
        self._blocks = Blocks(8, HALF_LIVES)

    def update(self, full: StepEstimate, norm_layers: StepEstimate, clock: Clock, global_batch: int) -> None:
        """Add the step that the clock has just counted, which measured both; its figures are finite."""
        figures: list[float] = []
        for step in (full, norm_layers):
            figures += [global_batch, global_batch * step.grad_sq, step.degrees, step.degrees * step.noise_trace]
        self._blocks.add(clock, figures)

    def estimate(self) -> Factors | None:
        """The factors, or None while too little is known."""
        if len(self._blocks) < MIN_BLOCKS:
            return None
        columns = self._blocks.weighted()
        weights, sums = columns[::2], columns[1::2]  # of |G|² and tr Σ of the whole, then of the norm layers
        means = sums.sum(axis=1) / weights.sum(axis=1)
        if np.any(means <= 0):
            return None
        signs = (-1, 1, 1, -1)  # of the logarithms that make log κ
        error = sum(
            sign * residuals(weight, total) / mean
            for sign, weight, total, mean in zip(signs, weights, sums, means, strict=True)
        )
        standard_error = float(np.linalg.norm(error))
        if standard_error > MAX_RELATIVE_ERROR:
            return None
        return Factors(
            grad_sq=float(means[0] / means[2]),
            noise_trace=float(means[1] / means[3]),
            log_half_width=standard_error * student_t(min(effective_blocks(weight) for weight in weights)),
        )

    def apply(self, norm_layers: NoiseScale) -> NoiseScale:
        """The noise scale of the whole gradient from that of the norm layers; unknown while κ is.

        The two errors are taken for independent, and added in squares, on the logarithm.
        """
        factors = self.estimate()
        if factors is None or norm_layers.value is None:
            return norm_layers.model_copy(update={"value": None, "low": None, "high": None})
        value = factors.kappa * norm_layers.value
        low = high = None
        if norm_layers.low is not None:
            width = math.log(norm_layers.value / norm_layers.low)
            low = value * math.exp(-math.hypot(factors.log_half_width, width))
        if norm_layers.high is not None:
            width = math.log(norm_layers.high / norm_layers.value)
            high = value * math.exp(math.hypot(factors.log_half_width, width))
        return NoiseScale(
            grad_sq=factors.grad_sq * norm_layers.grad_sq,
            noise_trace=factors.noise_trace * norm_layers.noise_trace,
            value=value,
            low=low,
            high=high,
            samples=norm_layers.samples,
            centroid=norm_layers.centroid,
        )

    def state(self) -> list[list[float]]:
        """Everything, as plain values for a checkpoint."""
        return self._blocks.state()

    def restore(self, state: list[list[float]]) -> None:
        """Take up what `state` gave."""
        self._blocks.restore(state)
