"""The noise estimate on gradients whose |G|² and tr Σ are known."""

from typing import Any

import numpy as np

from copus.noise.estimator import NoiseEstimator
from copus.noise.memory import Clock
from copus.noise.step_estimate import StepEstimate
from planner.sampling import HalfLife

DIMENSIONS = 64
NOISE_SCALE = 10.0
"""tr Σ / |G|² of the problem, in sequences; |G|² is 1."""
STEPS = 240
SHAPES = ((2, 1), (2, 8), (4, 4), (8, 2), (32, 1), (2, 32))
"""(J, n): parts of a step, sequences in a part."""


def problem() -> tuple[np.ndarray, np.ndarray]:
    """G, and the standard deviation of each coordinate of a sequence's gradient: unequal, as in a network (∝ k^−¼)."""
    gradient = np.random.default_rng(0).normal(size=DIMENSIONS)
    variance = np.arange(1, DIMENSIONS + 1) ** -0.5
    return gradient / np.linalg.norm(gradient), np.sqrt(variance * NOISE_SCALE / variance.sum())


def measure(parts: int, part_size: int, repetitions: int) -> dict[str, Any]:
    """Bias of the averages of |G|² and tr Σ and coverage of the 90 % interval, over independent runs of STEPS steps.

    `…_error_pct` is the standard error of the bias: what the repetitions cannot tell apart.
    """
    rng = np.random.default_rng([parts, part_size])
    gradient, deviation = problem()
    seen, covered, unknown, unbounded = [], 0, 0, 0
    for _ in range(repetitions):
        means = gradient + deviation / part_size**0.5 * rng.standard_normal((STEPS, parts, DIMENSIONS))
        mean_sq = (means.mean(axis=1) ** 2).sum(axis=-1)
        part_sq = (means**2).sum(axis=-1).mean(axis=1)
        batch = parts * part_size
        grad_sq = (batch * mean_sq - part_size * part_sq) / (batch - part_size)
        trace = (part_sq - mean_sq) / (1 / part_size - 1 / batch)
        clock, estimator = Clock(HalfLife(0, STEPS // 2)), NoiseEstimator()
        for step in range(STEPS):
            one = StepEstimate(float(grad_sq[step]), float(trace[step]), parts - 1)
            clock.tick(batch)
            estimator.update(one, clock, (step + 1) * batch, batch)
        noise = estimator.estimate()
        seen.append((noise.grad_sq, noise.noise_trace / NOISE_SCALE))
        unknown += noise.low is None
        unbounded += noise.low is not None and noise.high is None
        covered += noise.low is not None and noise.low <= NOISE_SCALE <= (noise.high or np.inf)
    bias = 100 * (np.mean(seen, axis=0) - 1)
    error = 100 * np.std(seen, axis=0, ddof=1) / repetitions**0.5
    return {
        "parts": parts,
        "part_size": part_size,
        "repetitions": repetitions,
        "bias_grad_sq_pct": float(bias[0]),
        "bias_grad_sq_error_pct": float(error[0]),
        "bias_trace_pct": float(bias[1]),
        "bias_trace_error_pct": float(error[1]),
        "coverage_pct": 100 * covered / repetitions,
        "unknown_pct": 100 * unknown / repetitions,
        "unbounded_pct": 100 * unbounded / repetitions,
    }
