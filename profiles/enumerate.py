"""Every configuration of a model on a cluster, as arrays."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from profiles.cluster import Cluster
from profiles.configurations import RECOMPUTE, Configurations
from profiles.model_shape import ModelShape
from profiles.pipeline_split import split_layers

Ints = NDArray[np.int64]


def enumerate_configurations(
    model: ModelShape,
    cluster: Cluster,
    global_batches: Sequence[int],
    *,
    max_tp: int | None = None,
    max_vp: int = 8,
    max_cp: int = 1,
    max_micro_batch: int = 16,
    recompute: Sequence[str] = RECOMPUTE,
    zero: Sequence[int] = (0, 1, 2, 3),
) -> Configurations:
    """All layouts that `Layout.check` passes, with all micro-batches (powers of two) of the global batches (in
    sequences).

    Also asked for: the tensor and context parallel ranks share a node unless `max_tp` says otherwise; cp cuts a
    sequence into 2·cp pieces (for causal balance); ep divides the experts and dp, and their matrices are split by tp;
    virtual stages have pp as a divisor of the number of micro-batches (2104.04473, §2.2.2); ZeRO-2 and 3 go without a
    pipeline; sequence parallelism wherever tp > 1 and tp divides the sequence. Raises ValueError for a recomputation or
    ZeRO stage that does not exist.
    """
    if unknown := [kind for kind in recompute if kind not in RECOMPUTE]:
        raise ValueError(f"recompute({unknown[0]}) is unknown: expected one of {', '.join(RECOMPUTE)}")
    if unknown_stage := [stage for stage in zero if stage not in range(4)]:
        raise ValueError(f"zero({unknown_stage[0]}) is unknown: expected 0 to 3")
    layouts = _layouts(model, cluster, max_tp or cluster.accelerators_per_node, max_vp, max_cp)
    micro_batches = 2 ** np.arange(int(max_micro_batch).bit_length())
    kinds = np.array([RECOMPUTE.index(kind) for kind in recompute])
    row, kind, stage, b, total = _grid(
        np.arange(layouts.shape[1]), kinds, np.array(zero), micro_batches, np.array(global_batches)
    )
    tp, pp, vp, cp, ep, dp = layouts[:, row]
    n, rest = np.divmod(total, dp * b)
    fits = (rest == 0) & (n > 0) & ((vp == 1) | (n % pp == 0)) & ((stage < 2) | (pp == 1))
    tp, pp, vp, cp, ep, dp, kind, stage, b, total = (
        axis[fits] for axis in (tp, pp, vp, cp, ep, dp, kind, stage, b, total)
    )
    return Configurations(
        tp=tp,
        pp=pp,
        vp=vp,
        cp=cp,
        ep=ep,
        expert_tp=tp,
        dp=dp,
        sequence_parallel=(tp > 1) & (model.seq_len % tp == 0),
        recompute=kind,
        zero=stage,
        dp_replicate=np.ones_like(stage),
        offload_optimizer=np.zeros_like(stage, dtype=np.bool_),
        micro_batch=b,
        global_batch=total,
    )


def _layouts(model: ModelShape, cluster: Cluster, max_tp: int, max_vp: int, max_cp: int) -> Ints:
    """The layouts that any micro-batch may have, as rows tp, pp, vp, cp, ep, dp: shape (6, layouts)."""
    size = cluster.accelerators
    by_tp = _divisors(np.gcd.reduce([size, model.heads, model.kv_heads, *model.mlp_widths, model.padded_vocab]))
    by_tp = by_tp[by_tp <= max_tp]
    by_cp = _divisors(size)
    by_cp = by_cp[(by_cp <= max_cp) & ((by_cp == 1) | (model.seq_len % (2 * by_cp) == 0))]
    by_ep = _divisors(model.experts) if model.experts else np.ones(1, dtype=np.int64)
    by_pp = _divisors(size)
    by_pp = by_pp[by_pp <= model.layers]
    by_vp = np.union1d(_divisors(model.layers), _divisors(model.layers + 2))
    by_vp = by_vp[by_vp <= max_vp]
    tp, pp, vp, cp, ep = _grid(by_tp, by_pp, by_vp, by_cp, by_ep)
    ranks = tp * pp * cp
    fits = (size % ranks == 0) & split_layers(model.layers, pp, vp).possible & ((vp == 1) | (pp > 1))
    fits &= size // ranks % ep == 0
    return np.stack([tp, pp, vp, cp, ep, size // ranks])[:, fits]


def _grid(*axes: Ints) -> list[Ints]:
    """All combinations, each axis flat."""
    return [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]


def _divisors(number: int) -> Ints:
    low = np.arange(1, int(number**0.5) + 1)
    low = low[number % low == 0]
    return np.unique(np.concatenate([low, number // low])).astype(np.int64)
