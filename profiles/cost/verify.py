"""Which measurement says most about what to choose: mostly that of the configuration that looks fastest."""

import numpy as np
from numpy.typing import NDArray

from profiles.cluster import Cluster
from profiles.configurations import Configurations
from profiles.cost.model import CostModel
from profiles.cost.work import Floats
from profiles.model_shape import ModelShape

POOL = 1000
"""Configurations that are looked at; of more, those that look fastest for their batch."""
_POINTS, _SHARES = np.polynomial.hermite_e.hermegauss(9)
_SHARES = _SHARES / _SHARES.sum()
# Gauss and Hermite's rule: means over a standard normal distribution, of what has kinks to a tenth or two.


def gains(
    cost: CostModel,
    model: ModelShape,
    cluster: Cluster,
    configurations: Configurations,
    precision: str,
    measured: Floats,
    may: NDArray[np.bool_] | None = None,
) -> Floats:
    """How much shorter the steps that one would choose are expected to be, once that configuration has been measured
    too: the mean over global batches, as a share of a step.

    `measured` are seconds, nan for configurations that were not measured; `cost` was fitted to them. Only those in
    `may` (None: all) and measured ones are chosen. Who has been measured keeps its time, and gains nothing.

    The knowledge gradient for correlated normal beliefs (Frazier, Powell and Dayanik 2009): a measurement moves all
    expectations in proportion to their covariance with it; the mean of the least one afterwards is below the least one
    now. That is worth most where the one that looks fastest may be slower than it looks (the choice by the least of
    many predictions picks those that are too low), or another one faster; and nothing where the choice is settled.
    """
    expected = np.log(cost.predict(model, cluster, configurations, precision, coverage=None).seconds)
    timed = np.isfinite(measured)
    expected[timed] = np.log(measured[timed])
    able = np.ones(len(expected), dtype=bool) if may is None else timed | may
    behind = np.full(len(expected), np.inf)
    size = configurations.global_batch
    of_batch = (np.flatnonzero(able & (size == batch)) for batch in np.unique(size))
    batches = [members for members in of_batch if len(members) > 1]
    for batch in batches:
        behind[batch] = expected[batch] - expected[batch].min()
    gain = np.zeros(len(expected))
    if not batches:
        return gain
    pool = np.sort(np.argsort(behind, kind="stable")[:POOL])
    errors = cost.errors(model, cluster, configurations.take(pool), precision)
    covariance = errors.covariance()
    moves = errors.spread * covariance / np.sqrt(np.diag(covariance) + errors.how.noise_sd**2)
    moves[timed[pool]] = 0.0
    for batch in batches:
        rows = np.flatnonzero(np.isin(pool, batch))
        now, moved = expected[pool[rows], None], moves[rows]
        after = sum(share * (now + moved * point).min(0) for point, share in zip(_POINTS, _SHARES, strict=True))
        gain[pool] += (now.min() - after) / len(batches)
    gain[timed] = 0.0
    return gain
