"""The running estimate of the noise scale: smooths |G|² and tr Σ apart, divides, and says how sure it is."""

import math
from typing import Any

import numpy as np
from scipy.special import stdtrit

from copus.noise.step_estimate import StepEstimate
from profiles.noise_scale import NoiseScale

BLOCKS_PER_HALF_LIFE = 16
HALF_LIVES_KEPT = 6
"""Older blocks weigh less than 1.6 % of a new one."""
MIN_BLOCKS = 5
"""Fewer blocks say nothing about the spread."""
CONFIDENCE = 0.90


class NoiseEstimator:
    """Averages over the recent past, measured in tokens, so that a change of batch does not change the memory.

    Steps are gathered into blocks that span a sixteenth of the half-life, however few of its steps are measured. A
    block of age a tokens weighs 2^(−a / half-life). Numerator and denominator of tr Σ / |G|² are averaged separately
    (their ratio step by step is heavily biased), each with the weights that its variance calls for: a step's |G|² with
    its tokens, its tr Σ with J − 1. The interval is Fieller's for a ratio of two means, with the block jackknife's
    covariance.
    """

    def __init__(self, half_life_tokens: int) -> None:
        self._half_life = half_life_tokens
        self._block_tokens = half_life_tokens / BLOCKS_PER_HALF_LIFE
        # Rows of: tokens of the run where the block begins and where it ends, then over its measured steps Σ tokens,
        # Σ tokens·|G|², Σ (J − 1), Σ (J − 1)·tr Σ.
        self._blocks: list[list[float]] = []
        self._samples = 0
        self._tokens_seen = 0.0

    def update(self, step: StepEstimate, tokens_seen: int, tokens: int) -> None:
        """Add a step of `tokens` tokens that ended at `tokens_seen` tokens of the run; its figures are finite."""
        self._samples += 1
        self._tokens_seen = tokens_seen
        if not self._blocks or tokens_seen - self._blocks[-1][0] > self._block_tokens:
            horizon = tokens_seen - HALF_LIVES_KEPT * self._half_life
            self._blocks = [each for each in self._blocks if each[1] > horizon]
            self._blocks.append([tokens_seen - tokens, *[0.0] * 5])
        block = self._blocks[-1]
        block[1] = tokens_seen
        block[2] += tokens
        block[3] += tokens * step.grad_sq
        block[4] += step.degrees
        block[5] += step.degrees * step.noise_trace

    def estimate(self) -> NoiseScale:
        """The noise scale now, with its 90 % interval; `value` is None while there is too little to tell."""
        if not self._blocks:
            return NoiseScale(grad_sq=0.0, noise_trace=0.0, value=None, low=None, high=None, samples=0)
        blocks = np.array(self._blocks)
        decay = 0.5 ** ((self._tokens_seen - blocks[:, 1]) / self._half_life)
        tokens, grad_sq, degrees, trace = (decay[:, None] * blocks[:, 2:]).T
        mean_grad_sq = float(grad_sq.sum() / tokens.sum())
        mean_trace = float(trace.sum() / degrees.sum())
        value = low = high = None
        if len(blocks) >= MIN_BLOCKS and mean_grad_sq > 0 and mean_trace > 0:
            low, high = ratio_interval(degrees, trace, tokens, grad_sq)
            value = None if low is None else mean_trace / mean_grad_sq
        return NoiseScale(
            grad_sq=mean_grad_sq, noise_trace=mean_trace, value=value, low=low, high=high, samples=self._samples
        )

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {"blocks": self._blocks, "samples": self._samples, "tokens_seen": self._tokens_seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict leaves a fresh estimator."""
        if state:
            self._blocks = [list(block) for block in state["blocks"]]
            self._samples = state["samples"]
            self._tokens_seen = state["tokens_seen"]


def residuals(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """What each block adds to the error of the mean Σ sums / Σ weights: (sums_j − weights_j·mean) / Σ weights.

    Scaled so that Σ_j residual_j² is the (infinitesimal) jackknife's variance of the mean, corrected for few blocks.
    """
    total = weights.sum()
    effective = effective_blocks(weights)
    return (sums - weights * (sums.sum() / total)) / total * math.sqrt(effective / max(effective - 1, 1e-9))


def effective_blocks(weights: np.ndarray) -> float:
    """(Σ w)² / Σ w²: how many blocks of equal weight say as much."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def student_t(effective: float) -> float:
    """Half-width of the two-sided 90 % interval, in standard deviations estimated from `effective` blocks."""
    return float(stdtrit(max(effective - 1, 1.0), 0.5 + CONFIDENCE / 2))


def ratio_interval(
    top_weights: np.ndarray, top: np.ndarray, bottom_weights: np.ndarray, bottom: np.ndarray
) -> tuple[float | None, float | None]:
    """90 % interval of T / G, with T = Σ top / Σ top_weights and G likewise, from blocks (Fieller 1954).

    It holds every ratio r for which T − r·G is within t standard deviations of zero: exact for normal means however
    noisy G is, where a delta-method interval is too short. (low, None) where G cannot be told from zero: the ratio may
    be as large as you like; (None, None) where T cannot either.
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
