"""Which candidates need not be looked at, whatever will be measured: others are faster, and fit."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planner.backend_traits import ANY_BACKEND, BackendTraits
from planner.config import PlannerConfig
from planner.sampling import noise_measurable
from planner.space import candidates
from profiles.accelerator import memory_bytes
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel
from profiles.memory import MEGATRON, Implementation, MemoryModel
from profiles.model_shape import ModelShape
from profiles.throughput import DECILE

FITS = 0.99
"""Chance to fit from which on less memory is worth nothing."""
GAIN = 0.02
"""What a candidate has to be able to gain over another, as a logarithm, so that measuring both is worth while."""
FAR_BEHIND = 3.0
"""Standard deviations that a candidate has to be behind the fastest one of its batch to be left out, whatever its
layout: the distribution has heavy tails."""


def worthwhile(
    config: PlannerConfig,
    model: ModelShape,
    cluster: Cluster,
    precision: str,
    start: Configuration,
    implementation: Implementation = MEGATRON,
    backend: BackendTraits = ANY_BACKEND,
) -> list[Configuration]:
    """What the job file allows (`planner.space.candidates`), in its order, without what is dominated.

    The layout that the job starts with stays at all batches, and so do layouts that the job file lists. What the models
    expect before any row decides, so that profiling, the running job and a resumed one look at the same candidates. If
    nothing is known of the accelerator none is left out.
    """
    allowed = candidates(config, model, cluster, start, backend, precision)
    if config.layouts:
        return allowed
    usable = np.array([noise_measurable(config, backend, candidate) for candidate in allowed], bool)
    try:
        out = dominated(allowed, usable, model, cluster, precision, implementation)
    except ValueError:
        return allowed
    return [c for c, is_out in zip(allowed, out.tolist(), strict=True) if not is_out or c.layout == start.layout]


def dominated(
    configurations: Sequence[Configuration],
    usable: NDArray[np.bool_],
    model: ModelShape,
    cluster: Cluster,
    precision: str,
    implementation: Implementation = MEGATRON,
) -> NDArray[np.bool_]:
    """Which configurations need not be looked at, because of another one that is `usable`.

    Of those that differ in recomputation and interleaving alone: if another surely fits, or needs no more memory, and
    is so much faster by the cost model that the chance of gaining `GAIN` is below a tenth; or if it only recomputes
    more, which cannot be faster. Of all layouts at one batch: if it is hopelessly behind (`FAR_BEHIND`) the fastest one
    that surely fits. Errors that predictions share cancel. Raises ValueError for an accelerator that the cost model
    does not know.
    """
    arrays = Configurations.of(configurations)
    cost = CostModel(
        optimizer=implementation.optimizer,
        stack=implementation.stack,
        context=implementation.context,
        dispatch=implementation.expert_dispatch,
    )
    logs = np.log(cost.predict(model, cluster, arrays, precision, coverage=None).seconds)
    errors = cost.errors(model, cluster, arrays, precision)
    room, memory = memory_bytes(cluster), MemoryModel(implementation).predict(model, arrays, precision)
    fits = np.ones(len(arrays), bool) if room is None else memory.chance_to_fit(room) >= FITS
    one, other = _pairs(arrays)
    slower = logs[one] - logs[other]
    hopeless = slower + GAIN > DECILE * errors.of_ratios(one, other)
    recomputes_more = (arrays.vp[one] == arrays.vp[other]) & (arrays.recompute[one] > arrays.recompute[other])
    enough = usable[other] & (fits[other] | (memory.peak_bytes[other] <= memory.peak_bytes[one]))
    out = np.zeros(len(arrays), bool)
    out[one[enough & (slower > 0) & (hopeless | recomputes_more)]] = True
    for batch in np.unique(arrays.global_batch):
        same = np.flatnonzero(arrays.global_batch == batch)
        able = same[(fits & usable)[same]]
        if len(able):
            best = np.full(len(same), able[np.argmin(logs[able])])
            behind = logs[same] - logs[best] + GAIN
            out[same[(same != best) & (behind > FAR_BEHIND * errors.of_ratios(same, best))]] = True
    return out


def _pairs(arrays: Configurations) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of all pairs of configurations that differ in recomputation and interleaving alone, both ways round."""
    degrees, sharing = ("tp", "pp", "cp", "ep", "expert_tp", "dp"), ("sequence_parallel", "zero", "offload_optimizer")
    names = (*degrees, *sharing, "micro_batch", "global_batch")
    keys = np.stack([getattr(arrays, name).astype(np.int64) for name in names], axis=1)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    _, starts, sizes = np.unique(group.ravel()[order], return_index=True, return_counts=True)
    one, other = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        members = order[start : start + size]
        first, second = np.nonzero(~np.eye(size, dtype=bool))
        one.append(members[first])
        other.append(members[second])
    return np.concatenate(one), np.concatenate(other)
