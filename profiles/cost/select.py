"""Which configurations to measure: those that say most about all the others."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from profiles.cluster import Cluster
from profiles.configurations import Configurations
from profiles.cost.model import CostModel
from profiles.cost.verify import gains
from profiles.cost.work import Floats
from profiles.model_shape import ModelShape

EQUAL = 0.6
"""Share of the attention that all configurations get alike; the rest goes to those that may be the fastest of their
batch."""
WEIGHT = 8.0
"""Power of (fastest ÷ own time) by which that rest is given out."""
POOL = 2000
"""Configurations that are looked at; of more, evenly spaced ones."""
SETTLED = 1e-6
"""Share of a step below which a measurement gains nothing for the choice."""


def next_to_measure(
    cost: CostModel,
    model: ModelShape,
    cluster: Cluster,
    configurations: Configurations,
    precision: str,
    measured: Floats,
    left: int,
    may: NDArray[np.bool_] | None = None,
) -> int:
    """Index of the configuration to measure now, where there is time for `left` more; -1 where all are measured.

    `measured` are seconds, nan for what was not measured; `cost` was fitted to them. All but the last serve the
    predictions (`select`), each with what the earlier ones said: where a step spends its time is not known before. The
    last one serves the choice, among `may` and what was measured (`profiles.cost.verify`): what looks fastest is
    verified before it is run for days.
    """
    timed = np.flatnonzero(np.isfinite(measured))
    if left == 1:
        gain = gains(cost, model, cluster, configurations, precision, measured, may)
        if gain.max(initial=0.0) > SETTLED:
            return int(np.argmax(gain))
    chosen = select(cost, model, cluster, configurations, precision, 1, leave_out=timed)
    return int(chosen[0]) if len(chosen) else -1


def select(
    cost: CostModel,
    model: ModelShape,
    cluster: Cluster,
    configurations: Configurations,
    precision: str,
    count: int,
    leave_out: Sequence[int] | NDArray[np.int64] = (),
) -> NDArray[np.int64]:
    """Indices of `count` configurations, most informative first, none of them in `leave_out`. No measured time is
    looked at but those `cost` was fitted to.

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
    open_ = ~np.isin(places, np.array(leave_out, dtype=np.int64))
    for _ in range(min(count, int(open_.sum()))):
        gain = (weights @ (c * c)) / (np.diag(c) + noise)
        best = int(np.argmax(np.where(open_, gain, -np.inf)))
        chosen.append(best)
        open_[best] = False
        c = c - np.outer(c[:, best], c[best]) / (c[best, best] + noise)
    return places[np.array(chosen, dtype=np.int64)]
