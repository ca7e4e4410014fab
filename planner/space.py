"""The configurations that may be chosen."""

import math
from collections.abc import Iterator
from typing import get_args

from planner.backend_traits import ANY_BACKEND, BackendTraits
from planner.config import PlannerConfig
from profiles.accelerator import memory_bytes, node_size
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.layout import Layout, Recompute
from profiles.model_shape import ModelShape
from profiles.pipeline_split import split_layers

RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
_CONTEXT_TOKENS = 4096
"""Tokens that a context parallel rank has of each sequence, at least. With fewer, the exchange of keys and values costs
more than the activations of a sequence are worth: other degrees divide these too."""
_EXPERT_SHARE = 0.5
"""Share of an accelerator's memory that the experts on it may take before they are spread over more nodes."""


def candidates(
    config: PlannerConfig,
    model: ModelShape,
    cluster: Cluster,
    start: Configuration,
    backend: BackendTraits = ANY_BACKEND,
    precision: str = "fp32",
) -> list[Configuration]:
    """Every layout × global batch × micro-batch that the job file allows and the backend runs in a precision, in a
    fixed order; `start` is always among them.

    Layouts are `config.layouts`, or every tp × pp × cp × dp that holds the model on the cluster, with the sequence
    parallelism (if tp > 1) and the sharding of the starting layout or whatever sharding the backend lets the planner
    choose, with every number of model chunks a pipeline stage (vp) that its layers can be cut into, and with every
    recomputation. Experts are split by tp, or not at all. Tensor parallel ranks stay within a node: their
    collectives wait for the link at every layer. So do the expert parallel ranks, unless the experts of a node would
    not fit on it. Context parallel ranks have `_CONTEXT_TOKENS` tokens each. `config.tp`, `max_pp`, `max_vp`, `max_cp`,
    `max_ep` and `recompute` pin layouts. Global batches are `batch_multiple` times powers of two, micro-batches powers
    of two, both in sequences and within the limits of `config`.
    """
    allowed = list(_within_limits(config, model, cluster, start.layout, backend, precision))
    return allowed if start in allowed else [start, *allowed]


def check_limits(
    config: PlannerConfig, model: ModelShape, cluster: Cluster, start: Layout, backend: BackendTraits, precision: str
) -> None:
    """Raise ValueError if the limits of the job file leave nothing to choose."""
    if next(_within_limits(config, model, cluster, start, backend, precision), None) is None:
        pins = [
            ("tp", config.tp),
            ("max_pp", config.max_pp),
            ("max_vp", config.max_vp),
            ("max_cp", config.max_cp),
            ("max_ep", config.max_ep),
            ("recompute", config.recompute),
            ("layouts", config.layouts and len(config.layouts)),
        ]
        said = [f"{name}({value})" for name, value in pins if value is not None]
        batches = f"global batches from {config.min_global_batch} to {config.max_global_batch}"
        raise ValueError(
            f"{', '.join([*said, batches])}, multiples of batch_multiple({config.batch_multiple}), leave no "
            f"configuration of {cluster.accelerators} accelerators; to keep the one of the job file, set policy: static"
        )


def _within_limits(
    config: PlannerConfig, model: ModelShape, cluster: Cluster, start: Layout, backend: BackendTraits, precision: str
) -> Iterator[Configuration]:
    for layout in dict.fromkeys(config.layouts or _variants(config, model, cluster, start, backend)):
        if not (_allowed(layout, config) and _runs(layout, model, backend)):
            continue
        for global_batch in _doubling(config.batch_multiple, config.min_global_batch, config.max_global_batch):
            for micro_batch in _doubling(1, 1, config.max_micro_batch):
                if global_batch % (layout.dp * micro_batch) == 0:
                    candidate = Configuration(layout=layout, micro_batch=micro_batch, global_batch=global_batch)
                    if backend.runs(candidate, precision):
                        yield candidate


def _allowed(layout: Layout, config: PlannerConfig) -> bool:
    """Whether the pins of the job file leave this layout."""
    return (
        config.tp in (None, layout.tp)
        and config.recompute in (None, layout.recompute)
        and (config.max_pp is None or layout.pp <= config.max_pp)
        and (config.max_vp is None or layout.vp <= config.max_vp)
        and (config.max_cp is None or layout.cp <= config.max_cp)
        and (config.max_ep is None or layout.ep <= config.max_ep)
    )


def _variants(
    config: PlannerConfig, model: ModelShape, cluster: Cluster, start: Layout, backend: BackendTraits
) -> Iterator[Layout]:
    """`layouts` with every sharding, every recomputation and every number of chunks a stage, tensor parallel ranks
    within a node."""
    largest_tp = config.tp or max(node_size(cluster), start.tp)
    # If memory is not checked nobody knows which recomputation is needed: the job's is one that works.
    recompute = RECOMPUTE if memory_bytes(cluster) else (start.recompute,)
    largest_cp = config.max_cp or max(model.seq_len // _CONTEXT_TOKENS, start.cp)
    splits = (
        layout
        for layout in layouts(model, cluster, start, largest_cp)
        if layout.tp <= largest_tp
        and (layout == start or config.max_ep or _experts_are_near(layout, model, cluster, backend))
    )
    for split in splits:
        for layout in _shardings(split, cluster, backend):
            for vp in interleavings(model, layout.pp):
                for how in [config.recompute] if config.recompute else recompute:
                    yield layout.model_copy(update={"vp": vp, "recompute": how})


def _experts_are_near(layout: Layout, model: ModelShape, cluster: Cluster, backend: BackendTraits) -> bool:
    """Whether the ranks that share experts out are on one node, or on no more nodes than the experts' weights,
    gradients and unshared optimizer state need: an all-to-all between nodes is slow. Fewer ranks are no alternative
    if the backend does not run them."""
    if layout.ep == 1 or layout.expert_tp * layout.ep <= node_size(cluster):
        return True
    memory = memory_bytes(cluster)
    ranks = layout.tp * layout.dp * layout.cp // layout.expert_tp
    fewer = (ep for ep in _divisors(math.gcd(model.experts, ranks)) if ep < layout.ep)
    degrees = [ep for ep in fewer if _runs(layout.model_copy(update={"ep": ep}), model, backend)]
    if not degrees:
        return True
    weights = (
        model.expert_layers * model.experts * model.expert_matrices / (layout.expert_tp * layout.pp * max(degrees))
    )
    return memory is not None and weights * (6 if layout.zero else 18) > _EXPERT_SHARE * memory


def _shardings(layout: Layout, cluster: Cluster, backend: BackendTraits) -> Iterator[Layout]:
    """A layout with everything that its data parallel ranks may share out: itself, every ZeRO stage that the backend
    leaves to the planner, and each of these within nodes."""
    yield layout
    sharers = node_size(cluster) // layout.tp
    copies = layout.dp // sharers if sharers > 1 and layout.dp % sharers == 0 else 1
    if layout.dp == 1:
        return
    for zero in backend.zero_stages or ():
        yield layout.model_copy(update={"zero": zero, "dp_replicate": 1})
        if zero and copies > 1 and backend.shards_within_nodes:
            yield layout.model_copy(update={"zero": zero, "dp_replicate": copies})


def layouts(model: ModelShape, cluster: Cluster, start: Layout, largest_cp: int = 1) -> list[Layout]:
    """Every split of the cluster into tp × pp × cp × dp, and of cp · dp into groups of ep, or with whole experts of
    tp · cp · dp, that passes `Layout.check`, else like `start`, and `start`."""
    splits = _splits(cluster.accelerators, model, start, largest_cp)
    possible = [layout for layout in splits if _holds(layout, model, cluster)]
    return possible if start in possible else [start, *possible]


def _splits(accelerators: int, model: ModelShape, start: Layout, largest_cp: int) -> Iterator[Layout]:
    for tp in _divisors(accelerators):
        for pp in _divisors(accelerators // tp):
            for cp in _divisors(accelerators // (tp * pp)):
                if cp > largest_cp:
                    break
                dp = accelerators // (tp * pp * cp)
                # A copy on a single rank is shared out among nobody: all of the traffic, and no memory saved.
                shared = start.zero and dp % start.dp_replicate == 0 and dp > start.dp_replicate
                for ep, etp in _expert_splits(model, tp, dp * cp):
                    yield Layout(
                        tp=tp,
                        pp=pp,
                        cp=cp,
                        ep=ep,
                        etp=etp,
                        dp=dp,
                        # Without it every rank would send all tokens to the experts.
                        sequence_parallel=(start.sequence_parallel or model.experts > 0) and tp > 1,
                        recompute=start.recompute,
                        zero=start.zero,
                        dp_replicate=start.dp_replicate if shared else 1,
                        offload_optimizer=start.offload_optimizer,
                    )


def _expert_splits(model: ModelShape, tp: int, replicas: int) -> Iterator[tuple[int, int | None]]:
    """Expert parallel degrees with the tensor parallel degree of the experts: that of all else, or 1. With degrees in
    between the same ranks hold the experts, and tokens are both gathered and sent."""
    if not model.experts:
        yield 1, None
        return
    for etp in (None, 1) if tp > 1 else (None,):
        for ep in _divisors(math.gcd(model.experts, replicas * tp if etp else replicas)):
            yield ep, etp


def _runs(layout: Layout, model: ModelShape, backend: BackendTraits) -> bool:
    try:
        backend.check_layout(layout)
        backend.check_model_in(layout, model)
    except ValueError:
        return False
    return True


def _holds(layout: Layout, model: ModelShape, cluster: Cluster) -> bool:
    try:
        layout.check(model, cluster)
    except ValueError:
        return False
    return True


def interleavings(model: ModelShape, pp: int) -> list[int]:
    """Model chunks that a pipeline stage may consist of, ascending."""
    if pp == 1:
        return [1]
    # With a layer more for the embedding, and one for the output layer, as well.
    chunks = sorted({1, *_divisors(-(-model.layers // pp)), *_divisors((model.layers + 2) // pp)})
    return [vp for vp in chunks if split_layers(model.layers, pp, vp).possible]


def _divisors(number: int) -> list[int]:
    """Ascending."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*low, *(number // divisor for divisor in low)})


def _doubling(first: int, low: int, high: int) -> Iterator[int]:
    """first, 2·first, 4·first, … within [low, high]."""
    value = first
    while value <= high:
        if value >= low:
            yield value
        value *= 2
