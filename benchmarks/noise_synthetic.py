"""Gradients whose |G|² and tr Σ are known, and the noise estimate on them."""

from functools import cache
from typing import Any

import numpy as np

from copus.backends.step_contract import Parts, StepResult
from copus.noise.estimator import NoiseEstimator
from copus.noise.memory import Clock
from copus.noise.step_estimate import StepEstimate
from planner.backend_traits import ANY_BACKEND
from planner.noise_sources import NORMLAYER, split
from planner.sampling import HalfLife, executed_configuration
from profiles.configuration import Configuration

DIMENSIONS = 64
NOISE_SCALE = 10.0
"""tr Σ / |G|² of the problem, in sequences; |G|² is 1."""
STEPS = 240
SHAPES = ((2, 1), (2, 8), (4, 4), (8, 2), (32, 1), (2, 32))
"""(J, n): parts of a step, sequences in a part."""


NORM_LAYERS = 0.6
"""Noise scale of the norm layers over that of the whole gradient: 1/κ."""


@cache
def _shape(dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """G with |G|² = 1, and the share of each coordinate in tr Σ: unequal, as in a network (∝ k^−½)."""
    gradient = np.random.default_rng(0).normal(size=dimensions)
    variance = np.arange(1, dimensions + 1) ** -0.5
    return gradient / np.linalg.norm(gradient), variance / variance.sum()


def problem(noise_scale: float = NOISE_SCALE, dimensions: int = DIMENSIONS) -> tuple[np.ndarray, np.ndarray]:
    """G, and the standard deviation of each coordinate of a sequence's gradient."""
    gradient, share = _shape(dimensions)
    return gradient, np.sqrt(noise_scale * share)


class SyntheticSteps:
    """Steps as a backend would report them, on normal gradients of known noise and |G|² = 1.

    The gradients of parts are not drawn. For normal noise the mean over the step's b sequences, ḡ ~ N(G, Σ/b), and the
    scatter of the parts around it are independent, and in coordinate k that scatter, Σ_j (g_jk − ḡ_k)², is σ_k²/n times
    a χ² of J − 1 degrees. The norm layers are another such gradient, independent of the whole.
    """

    def __init__(self, rng: np.random.Generator, dimensions: int = DIMENSIONS) -> None:
        """More `dimensions` make sharper estimates: those of tr Σ scatter by √(2 / their effective number)."""
        self._rng = rng
        self._dimensions = dimensions

    def step(self, configuration: Configuration, source: str | None, noise_scale: float) -> StepResult:
        """A step of a configuration, measured from a source of `planner.noise_sources`."""
        full, norm_layers = split(source)
        run = executed_configuration(ANY_BACKEND, configuration, source)
        parts = ANY_BACKEND.parts(run)
        return StepResult(
            loss=1.0,
            grad_sq=1.0,
            parts=self._parts(noise_scale, *parts[full]) if full else None,
            norm_layer_parts=self._parts(NORM_LAYERS * noise_scale, *parts[NORMLAYER]) if norm_layers else None,
            skipped=False,
            stop=False,
        )

    def _parts(self, noise_scale: float, count: int, size: int) -> Parts | None:
        """None for a single part, which says nothing."""
        if count < 2:
            return None
        gradient, deviation = problem(noise_scale, self._dimensions)
        mean = gradient + deviation / (count * size) ** 0.5 * self._rng.standard_normal(self._dimensions)
        scatter = float(deviation**2 @ self._rng.chisquare(count - 1, self._dimensions)) / size / count
        mean_sq = float(mean @ mean)
        return Parts(np.full(count, mean_sq + scatter), size, mean_sq)


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
