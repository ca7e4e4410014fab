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

    Steps are gathered into blocks of a sixteenth of the half-life. A block of age a tokens weighs 2^(−a / half-life);
    numerator and denominator of tr Σ / |G|² are averaged separately (their ratio step by step is heavily biased), and
    the interval is a delete-one-block jackknife of the logarithm of the ratio, for blocks of unequal weight (Busing,
    Meijer & van der Leeden 1999).
    """

    def __init__(self, half_life_tokens: int) -> None:
        self._half_life = half_life_tokens
        self._block_tokens = half_life_tokens / BLOCKS_PER_HALF_LIFE
        # Rows of: tokens at the end of the block, tokens observed in it, and the sums of |G|² and tr Σ weighted by
        # tokens.
        self._blocks: list[list[float]] = []
        self._open = True
        self._samples = 0
        self._skipped = 0
        self._tokens_seen = 0.0

    @property
    def skipped(self) -> int:
        """Steps left out because a figure was not finite."""
        return self._skipped

    def update(self, step: StepEstimate, tokens_seen: int, tokens: int) -> None:
        """Add a step of `tokens` tokens that ended at `tokens_seen` tokens of the run."""
        if not (math.isfinite(step.grad_sq) and math.isfinite(step.noise_trace)):
            self._skipped += 1
            return
        self._samples += 1
        self._tokens_seen = tokens_seen
        if not self._open or not self._blocks:
            self._blocks.append([0.0, 0.0, 0.0, 0.0])
            self._open = True
        block = self._blocks[-1]
        block[0] = tokens_seen
        block[1] += tokens
        block[2] += tokens * step.grad_sq
        block[3] += tokens * step.noise_trace
        if block[1] >= self._block_tokens:
            self._open = False
            horizon = tokens_seen - HALF_LIVES_KEPT * self._half_life
            self._blocks = [each for each in self._blocks if each[0] > horizon]

    def estimate(self) -> NoiseScale:
        """The noise scale now, with its 90 % interval; `value` is None while there is too little to tell."""
        if not self._blocks:
            return NoiseScale(grad_sq=0.0, noise_trace=0.0, value=None, low=None, high=None, samples=0)
        blocks = np.array(self._blocks)
        decay = 0.5 ** ((self._tokens_seen - blocks[:, 0]) / self._half_life)
        weights, grad_sq, trace = decay * blocks[:, 1], decay * blocks[:, 2], decay * blocks[:, 3]
        mean_grad_sq = float(grad_sq.sum() / weights.sum())
        mean_trace = float(trace.sum() / weights.sum())
        value = low = high = None
        if len(blocks) >= MIN_BLOCKS and mean_grad_sq > 0 and mean_trace > 0:
            value = mean_trace / mean_grad_sq
            low, high = _interval(weights, grad_sq, trace)
        return NoiseScale(
            grad_sq=mean_grad_sq, noise_trace=mean_trace, value=value, low=low, high=high, samples=self._samples
        )

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {
            "blocks": self._blocks,
            "open": self._open,
            "samples": self._samples,
            "skipped": self._skipped,
            "tokens_seen": self._tokens_seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict leaves a fresh estimator."""
        if state:
            self._blocks = [list(block) for block in state["blocks"]]
            self._open = state["open"]
            self._samples = state["samples"]
            self._skipped = state["skipped"]
            self._tokens_seen = state["tokens_seen"]


def _interval(weights: np.ndarray, grad_sq: np.ndarray, trace: np.ndarray) -> tuple[float | None, float | None]:
    """90 % interval of Σ trace / Σ grad_sq; (low, None) or (None, None) where |G|² cannot be told from zero.

    With h_j = total weight / weight of block j and pseudo-values h_j·θ − (h_j − 1)·θ_(−j), the variance is the mean of
    (pseudo-value − θ)² / (h_j − 1). θ is the logarithm of the ratio, so the interval stays positive.
    """
    theta = math.log(trace.sum() / grad_sq.sum())
    left_grad_sq = grad_sq.sum() - grad_sq
    left_trace = trace.sum() - trace
    if np.any(left_grad_sq <= 0) or np.any(left_trace <= 0):
        return None, None  # one block decides the sign: nothing is known
    left_theta = np.log(left_trace / left_grad_sq)
    h = weights.sum() / weights
    pseudo = h * theta - (h - 1) * left_theta
    variance = float(np.mean((pseudo - theta) ** 2 / (h - 1)))
    effective_blocks = weights.sum() ** 2 / (weights**2).sum()
    half_width = float(stdtrit(max(effective_blocks - 1, 1.0), 0.5 + CONFIDENCE / 2)) * math.sqrt(variance)
    return math.exp(theta - half_width), math.exp(min(theta + half_width, 700.0))
