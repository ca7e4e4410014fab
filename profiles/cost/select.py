"""Which configurations to measure: those that say most about all the others."""

import numpy as np
from numpy.typing import NDArray

from profiles.cluster import Cluster
from profiles.configurations import Configurations
from profiles.cost.model import CostModel
from profiles.model_shape import ModelShape

EQUAL = 0.6
"""Share of the attention that all configurations get alike; the rest goes to those that may be the fastest of their
batch."""
WEIGHT = 8.0
"""Power of (fastest ÷ own time) by which that rest is given out."""
POOL = 2000
"""Configurations that are looked at; of more, evenly spaced ones."""


def select(
    cost: CostModel, model: ModelShape, cluster: Cluster, configurations: Configurations, precision: str, count: int
) -> NDArray[np.int64]:
    """Indices of `count` configurations, most informative first. No measured time is looked at but those `cost` was
    fitted to.

    Greedy: each is the one whose measurement lowers the summed variance of all predictions most (active learning by
    Cohn 1996, eq. 8; the same as sequential A-optimal design). The variances are weighted by `EQUAL` and `WEIGHT`:
    errors matter everywhere, and most where the model thinks that a configuration may win its global batch.
    """
    places = np.unique(np.linspace(0, len(configurations) - 1, min(len(configurations), POOL)).round().astype(np.int64))
    looked_at = configurations.take(places)
    seconds = cost.predict(model, cluster, looked_at, precision, coverage=None).seconds
    fast = np.empty(len(places))
    for batch in np.unique(looked_at.global_batch):
        same = looked_at.global_batch == batch
        fast[same] = (seconds[same].min() / seconds[same]) ** WEIGHT
    weights = EQUAL / len(places) + (1 - EQUAL) * fast / fast.sum()
    c = cost.errors(model, cluster, looked_at, precision).covariance()
    noise = cost.smoothness.noise_sd**2
    chosen: list[int] = []
    open_ = np.ones(len(places), dtype=bool)
    for _ in range(min(count, len(places))):
        gain = (weights @ (c * c)) / (np.diag(c) + noise)
        best = int(np.argmax(np.where(open_, gain, -np.inf)))
        chosen.append(best)
        open_[best] = False
        c = c - np.outer(c[:, best], c[best]) / (c[best, best] + noise)
    return places[np.array(chosen, dtype=np.int64)]
