"""The running estimate of the noise scale: averages |G|² and tr Σ apart, divides, and says how sure it is."""

import math
from typing import Any

import numpy as np
from scipy.special import stdtrit

from copus.noise.memory import Blocks, Clock
from copus.noise.step_estimate import StepEstimate
from profiles.noise_scale import NoiseScale

MIN_BLOCKS = 5
"""Fewer blocks say nothing about the spread."""
CONFIDENCE = 0.90


class NoiseEstimator:
    """Averages over the recent past of a run, as its clock defines that.

    The numerator and the denominator of tr Σ / |G|² are averaged separately (the mean of their ratios is heavily
    biased), each with the weights that its variance calls for: a step's |G|² with its sequences, its tr Σ with J − 1.
    The interval is Fieller's for a ratio of two means, with the block jackknife's covariance.
    """

    def __init__(self) -> None:
        # Of |G|² and then of tr Σ: Σ weight, Σ weight·value, Σ weight·place in the run.
        self._blocks = Blocks(6)
        self._samples = 0

    def update(self, step: StepEstimate, clock: Clock, samples_consumed: int, global_batch: int) -> None:
        """Add the step that the clock has just counted, which ended at `samples_consumed` sequences of the run; its
        figures are finite."""
        self._samples += 1
        middle = samples_consumed - global_batch / 2
        figures = []
        for weight, value in ((global_batch, step.grad_sq), (step.degrees, step.noise_trace)):
            figures += [weight, weight * value, weight * middle]
        self._blocks.add(clock, figures)

    def estimate(self) -> NoiseScale:
        """The noise scale with its 90 % interval; `value` is None while there is too little to tell."""
        if not len(self._blocks):
            return NoiseScale(grad_sq=0.0, noise_trace=0.0, value=None, low=None, high=None, samples=0)
        sequences, grad_sq, grad_sq_place, degrees, trace, trace_place = self._blocks.weighted()
        mean_grad_sq = float(grad_sq.sum() / sequences.sum())
        mean_trace = float(trace.sum() / degrees.sum())
        value = low = high = None
        if len(self._blocks) >= MIN_BLOCKS and mean_grad_sq > 0 and mean_trace > 0:
            low, high = ratio_interval(degrees, trace, sequences, grad_sq)
            value = None if low is None else mean_trace / mean_grad_sq
        return NoiseScale(
            grad_sq=mean_grad_sq,
            noise_trace=mean_trace,
            value=value,
            low=low,
            high=high,
            samples=self._samples,
            # The two averages have different centres only for a while after a change of batch.
            centroid=float(grad_sq_place.sum() / sequences.sum() + trace_place.sum() / degrees.sum()) / 2,
        )

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {"blocks": self._blocks.state(), "samples": self._samples}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self._blocks.restore(state["blocks"])
        self._samples = state["samples"]


def residuals(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """The contribution of each block to the error of the mean Σ sums / Σ weights.

    It is (sums_j − weights_j·mean) / Σ weights, scaled so that Σ_j residual_j² is the (infinitesimal) jackknife's
    variance of the mean, corrected for few blocks.
    """
    total = weights.sum()
    effective = effective_blocks(weights)
    return (sums - weights * (sums.sum() / total)) / total * math.sqrt(effective / max(effective - 1, 1e-9))


def effective_blocks(weights: np.ndarray) -> float:
    """(Σ w)² / Σ w²: the number of blocks of equal weight that say as much."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def student_t(effective: float) -> float:
    """Half-width of the two-sided 90 % interval, in standard deviations estimated from `effective` blocks."""
    return float(stdtrit(max(effective - 1, 1.0), 0.5 + CONFIDENCE / 2))


def ratio_interval(
    top_weights: np.ndarray, top: np.ndarray, bottom_weights: np.ndarray, bottom: np.ndarray
) -> tuple[float | None, float | None]:
    """90 % interval of T / G, with T = Σ top / Σ top_weights and G likewise, from blocks (Fieller 1954).

    It holds every ratio r for which T − r·G is within t standard deviations of zero: exact for normal means however
    noisy G is, where a delta-method interval is too short. (low, None) if G cannot be told from zero: the ratio may
    be arbitrarily large; (None, None) if T cannot either.
    """
    t = student_t(min(effective_blocks(top_weights), effective_blocks(bottom_weights)))
    top_mean, bottom_mean = top.sum() / top_weights.sum(), bottom.sum() / bottom_weights.sum()
    top_error, bottom_error = residuals(top_weights, top), residuals(bottom_weights, bottom)
    # a·r² − 2·b·r + c ≤ 0
    a = bottom_mean**2 - t**2 * (bottom_error @ bottom_error)
    b = top_mean * bottom_mean - t**2 * (top_error @ bottom_error)
    c = top_mean**2 - t**2 * (top_error @ top_error)
    discriminant = max(b**2 - a * c, 0.0)  # T / G itself is always inside: below zero is rounding
    if c <= 0:
        return None, None
    low = float(c / (b + math.sqrt(discriminant)))
    return low, (float((b + math.sqrt(discriminant)) / a) if a > 0 else None)
