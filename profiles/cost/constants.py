"""The constants of the cost model: what they mean, and what is believed of them before anything is measured."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiles.accelerator import Accelerator


class Constant(NamedTuple):
    """A positive constant with a normal prior on its logarithm."""

    mean: float
    """Median of the prior."""
    log_sd: float
    """Standard deviation of its logarithm."""
    meaning: str
    """What it is."""


CONSTANTS: dict[str, Constant] = {
    "products": Constant(1.34, 0.17, "time of large matrix products over operations ÷ peak"),
    "half_speed_dimension": Constant(
        580.0, 0.5, "a product of m × k by k × n takes this times (1/m + 1/n + 1/k) of operations ÷ peak longer"
    ),
    "attention": Constant(5.4, 0.45, "time of attention over causal operations ÷ peak"),
    "elementwise": Constant(0.9, 0.5, "time of everything else over bytes ÷ memory bandwidth"),
    "layer_launch_seconds": Constant(1.05e-3, 0.5, "host time of one pass of one layer"),
    "pipeline_launch_seconds": Constant(
        8.0e-5,
        1.6,
        "more of it on pipeline stages, for each doubling of tensor parallel ranks (all wait for each other's host)",
    ),
    "unbalance": Constant(
        1.4, 1.4, "odds that the output layer comes on top of an equal share of layers, not instead of some"
    ),
    "microbatch_launch_seconds": Constant(2.8e-3, 1.0, "host time of a micro-batch besides its layers"),
    "tp_traffic": Constant(1.5, 0.45, "time of tensor parallel bytes over the link's"),
    "tp_latency_seconds": Constant(3.0e-5, 0.8, "of a tensor parallel collective"),
    "p2p_traffic": Constant(2.0, 0.7, "time of bytes between stages over the link's"),
    "p2p_latency_seconds": Constant(2.0e-4, 1.0, "of a message between stages"),
    "dp_traffic": Constant(0.85, 0.7, "time of data parallel bytes over the link's"),
    "shard_traffic": Constant(
        1.5,
        0.4,
        "time of a byte that ZeRO scatters or gathers (always in a ring) over that of one which is summed (in a tree, "
        "or in the switch)",
    ),
    "dp_latency_seconds": Constant(1.0e-3, 0.8, "of a data parallel exchange, for each doubling of ranks"),
    "dp_overlap": Constant(1.0, 0.8, "share of one backward pass under which the sum of gradients hides, at most 1"),
    "weights_overlap": Constant(
        0.5, 0.8, "share of one forward pass under which the gathering of updated weights hides, at most 1"
    ),
    "gather_overlap": Constant(
        0.67, 0.4, "share of a layer's compute under which the gathering of ZeRO-3 hides, at most 1"
    ),
    "congestion": Constant(0.09, 0.9, "loss of network bandwidth for each doubling of nodes, in powers of two"),
    "optimizer": Constant(1.5, 0.5, "time of the update over bytes ÷ memory bandwidth"),
    "step_seconds": Constant(1.25e-2, 1.0, "of a step, whatever it does"),
    "stragglers": Constant(0.011, 0.7, "growth of a micro-batch's time for each doubling of nodes"),
    "company": Constant(
        1.03, 0.05, "time of a rank's own work beside other ranks, which share power, memory and the host, over alone"
    ),
    # Widths have to be positive. GPUs of a kind are alike; a CPU's file says otherwise.
    "time_scale": Constant(1.0, 0.005, "time of all parts over what the other constants say"),
}
NAMES = tuple(CONSTANTS)


def prior(device: Accelerator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the constants' logarithms, for an accelerator.

    Raises ValueError where its file names a constant that does not exist.
    """
    if unknown := {*device.constants, *device.log_sd} - set(NAMES):
        raise ValueError(f"accelerator {device.name}: unknown constants {', '.join(sorted(unknown))}")
    means = [device.constants.get(name, constant.mean) for name, constant in CONSTANTS.items()]
    widths = [device.log_sd.get(name, constant.log_sd) for name, constant in CONSTANTS.items()]
    return np.log(means), np.array(widths)
