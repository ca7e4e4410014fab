"""What the formulas miss: a Gaussian process on the logarithm of measured ÷ computed time."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiles.cluster import Cluster
from profiles.configurations import Configurations
from profiles.cost.work import Floats
from profiles.model_shape import ModelShape

COORDINATES = (
    *("tp", "pp", "dp", "micro_batch", "num_microbatches", "vp", "cp", "ep", "etp"),
    *("zero", "recompute", "sp"),
    *("nodes", "width", "depth", "seq"),
    "shard",
)
"""What `coordinates` gives: log2 of the degrees, counts and sizes; flags as they are. `etp` is tp ÷ etp, 1 for most."""


class Smoothness(NamedTuple):
    """Hyperparameters of the Gaussian process: how far the error at one configuration informs that at another."""

    shape_sd: float = 0.085
    """Standard deviation of the error that depends on the shapes of the matrix products (tensor and context parallel
    degree, micro-batch), as a logarithm."""
    shape_length: float = 0.42
    """Doublings of these quantities over which that error changes."""
    layout_sd: float = 0.03
    """Standard deviation of the error that depends on the layout."""
    microbatch_sd: float = 0.036
    """Standard deviation of the error that depends on the layout and the micro-batch."""
    step_sd: float = 0.05
    """Standard deviation of the error that depends on everything, the number of micro-batches included."""
    noise_sd: float = 0.02
    """Standard deviation of repeats of one configuration."""
    degree_length: float = 1.3
    """Doublings of a degree of parallelism over which a miss changes."""
    batch_length: float = 2.9
    """Doublings of the micro-batch or of their number."""
    flag_length: float = 1.1
    """For recomputation, ZeRO stage and sequence parallelism, in steps."""
    size_length: float = 2.0
    """Doublings of nodes, width, depth and sequence length."""
    freedom: float = 4.0
    """Rows that the assumed size of misses is worth: how soon the rows' own misses set the width of intervals."""
    blind_spread: float = 0.75
    """Width of intervals on one node before any row, over what priors and misses add up to. With it the published
    sweeps, every source counting the same and predicted without it, lie in their intervals as often as they should."""
    blind_spread_of_nodes: float = 0.54
    """The same on several nodes."""
    blind_spread_of_experts: float = 1.2
    """The same of mixtures of experts, on any number of nodes: their software gets faster from release to release."""
    blind_spread_of_cores: float = 0.52
    """The same of CPU cores, of which nothing was published: their file's priors are for this width."""


_BATCH, _FLAGS, _SIZES, _SHAPE = (
    [COORDINATES.index(name) for name in names]
    for names in (
        ("micro_batch", "num_microbatches"),
        ("zero", "recompute", "sp"),
        ("nodes", "width", "depth", "seq"),
        ("tp", "cp", "micro_batch"),
    )
)
_SHARD = COORDINATES.index("shard")


def coordinates(model: ModelShape, cluster: Cluster, c: Configurations, shard: bool = False) -> Floats:
    """Where each configuration lies, for the distance between two: N × D, in the order of `COORDINATES`. `shard`: as
    one rank's work alone."""
    n = np.maximum(c.num_microbatches, 1)
    logs = np.log2(np.stack([c.tp, c.pp, c.dp, c.micro_batch, n, c.vp, c.cp, c.ep, c.tp / c.expert_tp]).astype(float))
    flags = np.stack([c.zero, c.recompute, c.sequence_parallel]).astype(float)
    size = [*np.log2([cluster.nodes, model.hidden, model.layers, model.seq_len]), float(shard)]
    return np.concatenate([logs, flags, np.repeat(np.array(size)[:, None], len(c), axis=1)]).T


def covariance(a: Floats, b: Floats, how: Smoothness) -> Floats:
    """Covariance of the misses at coordinates a (N × D) and b (M × D), noise left out: N × M.

    Four squared-exponential terms: shapes of the products; layout; layout and micro-batch; everything. A rank's work
    alone and a whole step have but the first in common: the others are of what ranks do together.
    """
    alike = a[:, _SHARD][:, None] == b[:, _SHARD][None, :]
    return _terms(a, b, alike, _near, how)


def covariance_of_pairs(a: Floats, b: Floats, how: Smoothness) -> Floats:
    """The same of each of N coordinates with one other: N."""
    return _terms(a, b, a[:, _SHARD] == b[:, _SHARD], _near_pairs, how)


def _terms(
    a: Floats, b: Floats, alike: NDArray[np.bool_], near: Callable[[Floats, Floats], Floats], how: Smoothness
) -> Floats:
    lengths = np.full(a.shape[1], how.degree_length)
    lengths[_FLAGS], lengths[_SIZES], lengths[_BATCH] = how.flag_length, how.size_length, how.batch_length
    rest = [index for index in range(a.shape[1]) if index not in (*_BATCH, _SHARD)]
    a_scaled, b_scaled = a / lengths, b / lengths
    layout = alike * near(a_scaled[:, rest], b_scaled[:, rest])
    m, n = (near(a_scaled[:, [index]], b_scaled[:, [index]]) for index in _BATCH)
    shape = near(a[:, _SHAPE] / how.shape_length, b[:, _SHAPE] / how.shape_length)
    shape = shape * near(a_scaled[:, _SIZES], b_scaled[:, _SIZES])
    total: Floats = how.shape_sd**2 * shape + layout * (
        how.layout_sd**2 + m * (how.microbatch_sd**2 + n * how.step_sd**2)
    )
    return total


def variance(how: Smoothness) -> float:
    """Variance of the miss at any one configuration, noise left out."""
    return how.shape_sd**2 + how.layout_sd**2 + how.microbatch_sd**2 + how.step_sd**2


def _near(a: Floats, b: Floats) -> NDArray[np.float64]:
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.T
    return np.exp(-0.5 * np.maximum(squared, 0.0))


def _near_pairs(a: Floats, b: Floats) -> NDArray[np.float64]:
    return np.asarray(np.exp(-0.5 * ((a - b) ** 2).sum(1)))
