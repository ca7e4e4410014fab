"""The constants of the cost model: what they mean, and what is believed of them before anything is measured or
published. What published runs say of them is in `profiles.cost.effects`."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiles.accelerator import Accelerator
from profiles.cost.effects import Effects, usual_effects


class Constant(NamedTuple):
    """A positive constant with a normal prior on its logarithm."""

    mean: float
    """Median of the prior."""
    log_sd: float
    """Standard deviation of its logarithm."""
    meaning: str
    """What it is."""


CONSTANTS: dict[str, Constant] = {
    "products": Constant(1.2, 0.17, "time of large matrix products over operations ÷ peak"),
    "half_speed_dimension": Constant(
        600.0, 0.5, "a product of m × k by k × n takes this times (1/m + 1/n + 1/k) of operations ÷ peak longer"
    ),
    "attention": Constant(2.5, 0.4, "time of attention over causal operations ÷ peak"),
    "attention_tokens": Constant(3000.0, 0.6, "tokens of context that attention takes longer than it has"),
    "elementwise": Constant(1.0, 0.5, "time of everything else over bytes ÷ memory bandwidth"),
    "layer_launch_seconds": Constant(1.0e-3, 0.2, "host time of one pass of one layer"),
    "expert_launch_seconds": Constant(1.0e-3, 0.8, "more of it for a layer with experts"),
    "pipeline_launch_seconds": Constant(
        1.0e-4,
        0.8,
        "more of it on pipeline stages, for each doubling of tensor parallel ranks (all wait for each other's host)",
    ),
    "unbalance": Constant(
        1.0, 1.4, "odds that the output layer comes on top of an equal share of layers, not instead of some"
    ),
    "microbatch_launch_seconds": Constant(3.0e-3, 0.5, "host time of a micro-batch besides its layers"),
    "tp_traffic": Constant(1.3, 0.45, "time of tensor parallel bytes over the link's"),
    "ep_traffic": Constant(1.0, 0.6, "time of bytes between experts over the link's"),
    "tp_latency_seconds": Constant(3.0e-5, 0.8, "of a tensor parallel collective"),
    "p2p_traffic": Constant(2.0, 0.7, "time of bytes between stages over the link's"),
    "p2p_latency_seconds": Constant(2.0e-4, 1.0, "of a message between stages"),
    "dp_traffic": Constant(1.3, 0.7, "time of data parallel bytes over the link's"),
    "shard_traffic": Constant(
        1.5,
        0.4,
        "time of a byte that ZeRO scatters or gathers (always in a ring) over that of one which is summed (in a tree, "
        "or in the switch)",
    ),
    "dp_latency_seconds": Constant(1.0e-3, 0.8, "of a data parallel exchange, for each doubling of ranks"),
    "dp_overlap": Constant(0.75, 0.8, "share of one backward pass under which the sum of gradients hides, at most 1"),
    "pipeline_overlap": Constant(
        0.5, 0.8, "share of that on a pipeline, whose stages wait for the last micro-batch of all, at most 1"
    ),
    "weights_overlap": Constant(
        0.5, 0.8, "share of one forward pass under which the gathering of updated weights hides, at most 1"
    ),
    "gather_overlap": Constant(
        0.7, 0.4, "share of a layer's compute under which the gathering of ZeRO-3 hides, at most 1"
    ),
    "congestion": Constant(0.1, 0.9, "loss of network bandwidth for each doubling of nodes, in powers of two"),
    "optimizer": Constant(1.5, 0.3, "time of the update over bytes ÷ memory bandwidth"),
    "step_seconds": Constant(1.0e-2, 0.3, "of a step, whatever it does"),
    "stragglers": Constant(0.015, 0.7, "growth of a micro-batch's time for each doubling of nodes"),
    "company": Constant(
        1.03, 0.05, "time of a rank's own work beside other ranks, which share power, memory and the host, over alone"
    ),
    # Widths have to be positive. GPUs of a kind are alike; a CPU's file says otherwise.
    "time_scale": Constant(1.0, 0.005, "time of all parts over what the other constants say"),
}
NAMES = tuple(CONSTANTS)


def prior(
    device: Accelerator,
    stack: str | None = None,
    precision: str = "bf16",
    effects: Effects | None = None,
    features: tuple[str, ...] = (),
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the constants' logarithms, for an accelerator, a software stack (None: one that
    nothing is known of), a precision and what is switched on (`features`). `effects` are those of the package if they
    are left out; an accelerator whose file is a guess has none, and constants of its own.

    Raises ValueError if its file names a constant that does not exist.
    """
    if unknown := {*device.constants, *device.log_sd} - set(NAMES):
        raise ValueError(f"accelerator {device.name}: unknown constants {', '.join(sorted(unknown))}")
    widths = np.array([device.log_sd.get(name, constant.log_sd) for name, constant in CONSTANTS.items()])
    known = Effects() if not device.rated else usual_effects() if effects is None else effects
    medians = {
        name: known.constants.get(name, constant.mean) for name, constant in CONSTANTS.items()
    } | device.constants
    shift, variance = known.of(stack, precision, device.name, NAMES, features)
    return np.log([medians[name] for name in NAMES]) + shift, np.sqrt(widths**2 + variance)
