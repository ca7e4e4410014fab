"""From work and constants to the seconds of a step, part by part."""

import numpy as np
from numpy.typing import NDArray

from profiles.cost.constants import NAMES
from profiles.cost.work import Floats, Work

PARTS = ("compute", "launch", "tp", "cp", "ep", "p2p", "bubble", "dp", "optimizer")
"""Parts of a step, as in `Predicted.breakdown`."""
OWN = ("compute", "launch", "optimizer")
"""Parts that a rank does by itself: the time of one accelerator for its shard alone."""

ROUND = 0.1
"""Share of a communication that shows even under ample work: its first message has nothing to hide under."""


def parts(w: Work, log_constants: NDArray[np.float64]) -> dict[str, Floats]:
    """Seconds of each part; they add up to the step.

    A micro-batch takes as long on a stage as the slower of the accelerator (compute and exposed communication) and the
    host that launches its kernels. A step of n micro-batches on a pipeline with stage times t_i takes n·max t_i + (Σ
    t_i − max t_i)/vp (2104.04473, §2.2), then what of the data parallel exchange does not hide under the last backward
    pass, then the update.
    """
    k = dict(zip(NAMES, np.exp(log_constants), strict=True))
    k |= {name: np.minimum(k[name], 1.0) for name in NAMES if name.endswith("_overlap")}
    drag = 1 + k["stragglers"] * w.nodes
    attention = k["attention"] * (w.layer_attention + k["attention_tokens"] * w.layer_attention_token)
    compute = drag * (
        k["products"] * w.layer_products
        + k["half_speed_dimension"] * w.layer_operands
        + attention
        + k["elementwise"] * w.layer_elementwise
    )
    tp = k["tp_traffic"] * w.layer_tp + k["tp_latency_seconds"] * w.layer_tp_messages
    crowd = np.exp2(k["congestion"] * w.congestion)
    dp_rate = k["dp_traffic"] * crowd
    cp = _exposed(k["tp_traffic"] * w.layer_cp, k["attention"] * w.layer_cp_cover)
    ep = k["ep_traffic"] * w.layer_ep
    gather = _exposed(dp_rate * w.layer_gather, k["gather_overlap"] * (compute + tp))
    layer = compute + tp + cp + ep + gather
    head = drag * (
        k["products"] * w.head_products
        + k["half_speed_dimension"] * w.head_operands
        + k["elementwise"] * w.head_elementwise
    )
    host_layer = w.passes * (
        k["layer_launch_seconds"]
        + k["expert_launch_seconds"] * w.expert_share
        + k["pipeline_launch_seconds"] * w.staged_tp
    )
    host_batch = k["microbatch_launch_seconds"]
    p2p, mean_p2p = (
        k["p2p_traffic"] * traffic + k["p2p_latency_seconds"] * w.p2p_messages for traffic in (w.p2p, w.p2p_mean)
    )
    ahead, cover = w.vp > 1, w.stage_layers * compute  # an interleaved schedule sends ahead
    p2p, mean_p2p = (np.where(ahead, _exposed(seconds, cover), seconds) for seconds in (p2p, mean_p2p))

    uneven = k["unbalance"] / (1 + k["unbalance"])
    last = w.last_layers * layer + head
    share = (w.layers * layer + head) / w.pp
    busiest = uneven * np.maximum(last, w.stage_layers * layer) + (1 - uneven) * np.maximum(share, head)
    device = busiest + p2p
    host = w.stage_layers * host_layer + host_batch
    slowest = _slower(device, host)
    whole = w.layers * layer + head + w.pp * mean_p2p
    whole = _slower(whole, w.layers * host_layer + w.pp * host_batch)
    bubble = np.maximum(whole - slowest, 0.0) / w.vp
    n = w.num_microbatches
    busy = n * busiest / (w.layers * layer + head)  # the busiest stage's share of the whole model, n times
    layers = busy * w.layers
    dp = k["dp_latency_seconds"] * w.dp_messages
    # ZeRO's exchanges go in rings; sums that everybody keeps go through trees or the switch.
    reduced = dp_rate * (w.dp_reduce + k["shard_traffic"] * w.dp_scatter)
    hidden = k["dp_overlap"] * np.where(w.pp > 1, k["pipeline_overlap"], 1.0)
    dp = dp + _exposed(reduced, hidden * 2 / 3 * whole / w.pp)
    dp = dp + _exposed(dp_rate * k["shard_traffic"] * w.dp_gather, k["weights_overlap"] / 3 * whole / w.pp)
    components = {
        "compute": layers * compute + busy * head,
        "launch": n * (slowest - device) + k["step_seconds"],
        "tp": layers * tp,
        "cp": layers * cp,
        "ep": layers * ep,
        "p2p": n * p2p,
        "bubble": bubble,
        "dp": dp + layers * gather,
        "optimizer": k["optimizer"] * w.optimizer,
    }
    return {name: k["time_scale"] * seconds for name, seconds in components.items()}


def step_seconds(w: Work, log_constants: NDArray[np.float64], shard: NDArray[np.bool_] | None = None) -> Floats:
    """Seconds of a step; where `shard` is true, of the parts of it that a rank does by itself, alone on its node."""
    components = parts(w, log_constants)
    total: Floats = sum(components.values(), start=np.zeros(len(w)))
    if shard is None:
        return total
    company = np.exp(log_constants[NAMES.index("company")] * w.shared_node)
    alone = sum((components[name] for name in OWN), start=np.zeros(len(w))) / company
    return np.where(shard, alone, total)


def _slower(a: Floats, b: Floats) -> Floats:
    """The larger of two, smoothly: (a⁴ + b⁴)^¼. They run side by side, and jitter makes the one wait for the other."""
    return np.sqrt(np.sqrt((a * a) * (a * a) + (b * b) * (b * b)))


def _exposed(busy: Floats, cover: Floats) -> Floats:
    """What remains of a communication under `cover` seconds of work: busy − cover, rounded off at 0.

    ½(d + √(d² + 4·ROUND·busy·cover)) with d = busy − cover: all of it where there is no cover, and ROUND of it where
    there is much.
    """
    over = busy - cover
    return 0.5 * (over + np.sqrt(over * over + (4 * ROUND) * (busy * cover)))
