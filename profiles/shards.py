"""From the work of single shards to steps: what a cost model says of the network, added to what was measured."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from profiles.configurations import Configurations
from profiles.measurement import Measurement

OWN = ("compute", "launch", "optimizer")
"""Parts of a predicted step that a shard alone does too, and that its measurement therefore replaces."""
WAITING = "bubble"
"""The part that is waiting for other stages' work: it grows as that work does."""


def steps_from_shards(
    shards: Sequence[Measurement], breakdown: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Seconds of a step of each shard's configuration.

    `breakdown` is a cost model's, for `configurations_of(shards)`: seconds of each part of a step (compute, launch, tp,
    cp, ep, p2p, bubble, dp, optimizer, …), arrays of length N. With s the measured and p = Σ own parts the predicted
    work:

        step = s + bubble · s / p + Σ of the other parts, as predicted

    A measured shard says nothing of the network, so its parts are taken as they come. Raises ValueError for a
    measurement that is no shard or has no time, or where the breakdown lacks the shard's own work.
    """
    for each in shards:
        if not each.shard or each.step_seconds is None:
            raise ValueError(f"{each.configuration.label}: not the time of a shard")
    measured = np.array([each.step_seconds for each in shards], dtype=float)
    zero = np.zeros_like(measured)
    own = sum((breakdown.get(name, zero) for name in OWN), zero)
    if (own <= 0).any():
        raise ValueError(f"the breakdown has no {', '.join(OWN)}: nothing that the shards' times could replace")
    network = sum((seconds for name, seconds in breakdown.items() if name not in (*OWN, WAITING)), zero)
    step: NDArray[np.float64] = measured * (1 + breakdown.get(WAITING, zero) / own) + network
    return step


def configurations_of(shards: Sequence[Measurement]) -> Configurations:
    """Their configurations, as cost models take them."""
    return Configurations.of(each.configuration for each in shards)
