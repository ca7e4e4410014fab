"""What the formulas miss: a Gaussian process on the logarithm of measured ÷ computed time."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiles.cost.work import COORDINATES, Floats


class Smoothness(NamedTuple):
    """How far what was seen at one configuration says something about another."""

    layout_sd: float = 0.10
    """Of a miss that depends on the layout alone, as a logarithm."""
    microbatch_sd: float = 0.08
    """Of a miss that depends on the layout and the micro-batch."""
    step_sd: float = 0.03
    """Of a miss that depends on everything, the number of micro-batches included."""
    noise_sd: float = 0.02
    """Of what repeats of one configuration differ by."""
    degree_length: float = 1.5
    """Doublings of a degree of parallelism over which a miss changes."""
    batch_length: float = 2.0
    """Doublings of the micro-batch or of their number."""
    flag_length: float = 1.5
    """For recomputation, ZeRO stage and sequence parallelism, in steps."""
    size_length: float = 2.0
    """Doublings of nodes, width, depth and sequence length."""
    freedom: float = 4.0
    """Rows that the assumed size of misses is worth: how soon the rows' own misses set the width of intervals."""


_KIND = {"micro_batch": "m", "num_microbatches": "n", "zero": "flag", "recompute": "flag", "sp": "flag"}
_KIND |= dict.fromkeys(("nodes", "width", "depth", "seq"), "size")
KINDS = np.array([_KIND.get(name, "degree") for name in COORDINATES])


def covariance(a: Floats, b: Floats, how: Smoothness) -> Floats:
    """Covariance of the misses at coordinates a (N × D) and b (M × D), noise left out: N × M.

    Three nested squared-exponential terms: layout, layout and micro-batch, everything.
    """
    layout = np.where(KINDS == "degree", how.degree_length, np.where(KINDS == "flag", how.flag_length, how.size_length))
    use = (KINDS != "m") & (KINDS != "n")
    near = np.exp(-0.5 * _distance(a[:, use] / layout[use], b[:, use] / layout[use]))
    m = np.exp(-0.5 * _distance(*(x[:, KINDS == "m"] / how.batch_length for x in (a, b))))
    n = np.exp(-0.5 * _distance(*(x[:, KINDS == "n"] / how.batch_length for x in (a, b))))
    total: Floats = near * (how.layout_sd**2 + m * (how.microbatch_sd**2 + n * how.step_sd**2))
    return total


def variance(how: Smoothness) -> float:
    """Variance of the miss at any one configuration, noise left out."""
    return how.layout_sd**2 + how.microbatch_sd**2 + how.step_sd**2


def _distance(a: Floats, b: Floats) -> NDArray[np.float64]:
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.T
    return np.maximum(squared, 0.0)
