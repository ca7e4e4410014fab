"""What one optimizer step says about |G|² and tr Σ."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepEstimate:
    """Unbiased, and very noisy: either may be negative, and must not be clipped before averaging."""

    grad_sq: float
    """Estimate of |G|²."""
    noise_trace: float
    """Estimate of tr Σ, for one sequence."""
    degrees: int = 1
    """J − 1: the variance of `noise_trace` is inversely proportional to it, whatever the size of the parts."""


def estimate_step(mean_grad_sq: float, parts_sq: np.ndarray, part_size: int) -> StepEstimate:
    """Estimate |G|² and tr Σ from one step made of J parts of n sequences (McCandlish et al. 2018, app. A.2).

    With b = J·n, g the mean gradient over b sequences and g_j that of part j:

        |G|² = (b·|g|² − n·mean_j|g_j|²) / (b − n)        tr Σ = (mean_j|g_j|² − |g|²) / (1/n − 1/b)

    `mean_grad_sq` is |g|², `parts_sq` the J values |g_j|². Any inner product will do, as long as it is the same for
    both and does not depend on the step's own gradients: some coordinates, or coordinates divided by Adam's √v̂.
    Raises ValueError for fewer than two parts: nothing can be said.
    """
    if len(parts_sq) < 2:
        raise ValueError(f"noise needs at least two parts, got {len(parts_sq)}")
    n = part_size
    b = n * len(parts_sq)
    mean_part_sq = float(np.mean(parts_sq))
    return StepEstimate(
        grad_sq=(b * mean_grad_sq - n * mean_part_sq) / (b - n),
        noise_trace=(mean_part_sq - mean_grad_sq) / (1 / n - 1 / b),
        degrees=len(parts_sq) - 1,
    )
