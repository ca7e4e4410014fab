"""What a step has to do, before any constant: operations, bytes and messages of each rank, in seconds by the data
sheet.

Dense layers as in Megatron-LM (2104.04473, 2205.05198): a rank holds 1/tp of every matrix and 1/pp of the layers, and
works on micro_batch · seq_len / cp tokens at a time. All arrays have one entry per configuration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from profiles.accelerator import Accelerator, node_size
from profiles.cluster import Cluster
from profiles.configurations import RECOMPUTE, Configurations
from profiles.layout import ContextExchange, ExpertDispatch
from profiles.model_shape import ModelShape
from profiles.optimizer_state import OptimizerState
from profiles.pipeline_split import split_layers

Floats = NDArray[np.float64]
HALF = 2.0
"""Bytes of a number in activations and in the copies of weights that matrix products read."""
GRADIENT = 2.0
"""Bytes of a number in the gradients that are reduced; who reduces in fp32 has twice the constant `dp_traffic`."""
LOSS = 4.0
"""Bytes of a number in logits and their gradients."""
HOST_OPTIMIZER_SECONDS = 2.0e-8
"""For each weight of a rank whose optimizer state is offloaded: its gradient goes to the host, is added up and used
there, and the new weight comes back. Two pairs of published rows (7 B on 8 × A800, ZeRO-2 and 3 with and without
offloading, DeepSpeed 0.14) differ by 20 and 24 ns; a host with faster memory takes a fraction of it."""
NORM_PASSES = 10.0
"""Reads and writes of a tokens × hidden tensor by what stands between the matrix products of a layer, forward: two
norms, two residual sums, two dropouts or their like."""
PASSES_OF_A_NORM = 2.0
"""Passes over the residual stream per norm."""
SPLIT_PASSES = 6.0
"""The same inside the tensor parallel region, by rotary positions and copies of heads."""
PERMUTE_PASSES = 4.0
"""Reads and writes of a token's copies for its experts: into their order, and back. After megatron-core's plain
all-to-all once more: what comes from each rank is in the order of the experts, and all together is not."""
BACKWARD = 2.0
"""Work of a backward pass over that of a forward pass."""


_GATHERED = np.array([0.0, 0.0, GRADIENT, GRADIENT + 2 * HALF])
_REDUCED = np.array([2 * GRADIENT, GRADIENT, 0.0, 0.0])
_REDUCED_OF_PIPELINE = np.array([2 * GRADIENT, GRADIENT, GRADIENT, GRADIENT])
# Bytes that are exchanged for a parameter, by ZeRO stage: on every micro-batch, and once a step for gradients.


@dataclass(frozen=True)
class Work:
    """Seconds at the data sheet's rates, and counts. `layer_` is one layer and one micro-batch, forward and
    backward."""

    num_microbatches: Floats
    """Micro-batches of a replica."""
    vp: Floats
    """Model chunks per stage."""
    pp: Floats
    """Pipeline stages."""
    layers: Floats
    """Layers in all."""
    stage_layers: Floats
    """Layers of the fullest stage."""
    last_layers: Floats
    """Layers of the last stage, which has the output layer too."""
    expert_share: Floats
    """Share of the layers that have experts."""
    passes: Floats
    """Forward passes' worth of kernels launched for a layer: 2, or 3 where the forward pass is recomputed."""
    staged_tp: Floats
    """log2 of the tensor parallel degree where there is a pipeline, 0 where there is none."""
    layer_products: Floats
    """Matrix products: operations ÷ peak."""
    layer_operands: Floats
    """Matrix products: bytes of operands and results ÷ peak of half precision. For one product of m × k by k × n that
    is (1/m + 1/n + 1/k) of its operations' time."""
    layer_attention: Floats
    """Scores and their product with the values: causal operations ÷ peak."""
    layer_attention_token: Floats
    """The same for one more token of context: what a kernel does for every query, however short its context."""
    layer_elementwise: Floats
    """Everything else: bytes ÷ memory bandwidth."""
    layer_tp: Floats
    """Tensor parallel collectives: bytes ÷ link."""
    layer_tp_messages: Floats
    """Their number."""
    layer_cp: Floats
    """Keys and values, and their gradients, that context parallel ranks exchange: bytes ÷ link."""
    layer_cp_cover: Floats
    """The part of `layer_attention` that this goes on beside."""
    layer_ep: Floats
    """Tokens that go to their experts and back: bytes ÷ link."""
    layer_gather: Floats
    """Weights that ZeRO-3 gathers, and gradients that ZeRO-2 and 3 reduce, on every micro-batch: bytes ÷ link."""
    head_products: Floats
    """Output layer: operations ÷ peak."""
    head_operands: Floats
    """Output layer: bytes of operands and results ÷ peak of half precision."""
    head_elementwise: Floats
    """Loss: bytes ÷ memory bandwidth."""
    p2p: Floats
    """Activations and their gradients to and from the next stage, one micro-batch, all chunks: bytes ÷ link. Of the
    slowest boundary: that between nodes, if there is one."""
    p2p_mean: Floats
    """The same, mean over the boundaries."""
    p2p_messages: Floats
    """Their number."""
    dp_reduce: Floats
    """Gradients that data parallel ranks sum once a step, each for itself: all without ZeRO, and with hybrid sharding
    each rank's share over the copies. Bytes ÷ link."""
    dp_scatter: Floats
    """The same with ZeRO, where each keeps its share of the sum: bytes ÷ link."""
    dp_gather: Floats
    """Updated weights that they gather once a step, with ZeRO: bytes ÷ link."""
    dp_messages: Floats
    """Ranks that the exchange goes through."""
    optimizer: Floats
    """Weights' update: bytes ÷ memory bandwidth, or `HOST_OPTIMIZER_SECONDS` on the host."""
    congestion: Floats
    """log2 of the nodes that a data parallel exchange spans."""
    nodes: Floats
    """log2 of the nodes of the job."""
    shared_node: Floats
    """1 where ranks share a node, 0 where each has one for itself."""

    def __len__(self) -> int:
        return len(self.layers)

    def take(self, where: NDArray[np.bool_] | NDArray[np.int64]) -> "Work":
        """The work of the configurations at the given places."""
        return Work(**{field.name: getattr(self, field.name)[where] for field in fields(self)})

    @classmethod
    def concatenate(cls, parts: "Sequence[Work]") -> "Work":
        """Several, one after the other."""
        return cls(**{field.name: np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(cls)})


def work(
    model: ModelShape,
    cluster: Cluster,
    device: Accelerator,
    c: Configurations,
    precision: str,
    optimizer: OptimizerState = OptimizerState(),  # noqa: B008 (immutable)
    context: ContextExchange = "ring",
    dispatch: ExpertDispatch = "alltoall",
) -> Work:
    """The work of each configuration. Raises ValueError for a precision that the accelerator does not have."""
    wide = "bf16" if "fp8" in precision or "fp4" in precision else precision  # what attention runs in
    peak, wide_peak = (device.clock * device.peak(kind) for kind in (precision, wide))
    memory = device.memory_bytes_per_second
    tp, pp, vp, cp, dp, b = (a.astype(float) for a in (c.tp, c.pp, c.vp, c.cp, c.dp, c.micro_batch))
    ep, etp = c.ep.astype(float), c.expert_tp.astype(float)
    n = np.maximum(c.global_batch / (dp * b), 1.0)
    full, selective = c.recompute == RECOMPUTE.index("full"), c.recompute == RECOMPUTE.index("selective")
    again, attention_again = full.astype(float), (full | selective).astype(float)
    per_node = float(node_size(cluster))
    sheet = _Links(device, per_node)

    h, f, layers = float(model.hidden), float(model.ffn_hidden), float(model.layers)
    q, kv = float(model.query_width), float(model.kv_width)
    gates = 2.0 if model.gated_mlp else 1.0
    # All layers count as their mean: a share of them has experts, the first ones may have none.
    moe = model.expert_layers / layers
    chosen, shared = moe * model.experts_per_token, moe * model.shared_expert_hidden
    width = (1 - moe) * f + chosen * model.expert_width + shared
    """Width of all MLPs that a token goes through."""
    gathered_copies = chosen * etp / tp
    """Copies of a token that the ranks which split an expert have together, after dispatch."""
    inputs = 1 - moe + gathered_copies + moe * (shared > 0)
    """Copies of a token that go into these."""
    tokens = b * (model.seq_len / cp)
    products = 2 * tokens * (model.attention_matrices + (gates + 1) * h * width + moe * h * model.experts) / tp
    attention_weights = model.attention_matrices / tp
    dense_weights = attention_weights + (gates + 1) * h * ((1 - moe) * f + shared) / tp
    expert_weights = moe * model.expert_matrices * model.experts / (ep * etp)
    touched = tokens * ((2 + inputs) * h + (2 * q + 2 * kv + (gates + 1) * width) / tp + inputs * h)
    operands = HALF * (touched + dense_weights + expert_weights)
    causal = (
        2 * tokens * model.seq_len * model.attention_width / tp
    )  # all scores, also where a window hides some: the kernels skip none
    causal_token = 2 * tokens * model.attention_width / tp
    split = np.where(c.sequence_parallel, tp, 1.0)
    passes_whole = NORM_PASSES + PASSES_OF_A_NORM * (model.norms_per_layer - 2)
    passes_split = SPLIT_PASSES * q + PASSES_OF_A_NORM * (q + kv) * (model.qk_norm != "none")
    sorts = np.where((dispatch == "alltoall") & (model.experts > ep), 2.0, 1.0)
    sorted_tokens = sorts * PERMUTE_PASSES * chosen * h / tp
    elementwise = HALF * tokens * (passes_whole * h / split + (passes_split + (1 + 2 * gates) * width) / tp)
    elementwise = elementwise + HALF * tokens * sorted_tokens

    forward = 1 + again + BACKWARD
    passes = 2 + again
    hidden_bytes = HALF * tokens * h
    # Half of them are of attention, and a shared expert has its own. Ranks that split an expert gather every copy that
    # was dispatched to one of them, and scatter the sums before they go back, unless all of them have every token.
    exchanged_copies = 0 * tp if dispatch == "allgather" else gathered_copies
    half, between_experts = np.where(tp > 1, 2 + again, 0.0), np.where((etp > 1) & (exchanged_copies > 0), moe, 0.0)
    by_tp = 2 - moe + moe * (model.shared_expert_hidden > 0)
    tp_link, etp_link = (sheet.bus(degree, np.ones_like(degree)) for degree in (tp, etp))
    tp_seconds = by_tp * (tp - 1) / tp / tp_link + exchanged_copies * (etp - 1) / etp / etp_link
    kv_bytes = HALF * tokens * 2 * kv / tp
    replicas, copies = dp * cp, c.dp_replicate.astype(float)
    sharers = replicas / copies  # hybrid sharding gathers and scatters among neighbours, and sums over the copies
    ring = (sharers - 1) / sharers
    dp_link = sheet.bus(sharers, tp)
    # Experts lie on neighbours of the ranks that split one, and each one's replicas that far apart.
    expert_replicas = np.maximum(sharers * tp / (etp * ep), 1.0)
    expert_ring, expert_link = (expert_replicas - 1) / expert_replicas, sheet.bus(expert_replicas, etp * ep)
    layer_parameters = dense_weights + moe * h * model.experts + model.column_biases / tp + model.whole_vectors

    # A pipeline keeps gathered weights and sums gradients over its micro-batches: then once a step.
    single = pp == 1
    gathers = np.where(single, _GATHERED[c.zero], 0.0)
    gather = gathers * (layer_parameters * ring / dp_link + expert_weights * expert_ring / expert_link)
    stages = split_layers(model.layers, c.pp, c.vp)
    # Published runs may be split in ways of their own: then whole chunks, rounded.
    stage_layers = np.where(stages.possible, np.maximum(stages.first, stages.middle), np.ceil(layers / (pp * vp)) * vp)
    last_layers = np.where(stages.possible, stages.last, np.maximum(np.floor(layers / (pp * vp)) * vp, 1.0))
    embedding = float(model.padded_vocab) * h / tp
    ends = embedding * np.where(pp > 1, 1.0, 1.0 if model.tied_embeddings else 2.0) + model.position_embeddings
    dense_parameters, expert_parameters = stage_layers * layer_parameters + ends, stage_layers * expert_weights
    # Weights over their links, for the ends alone and for everything; then bytes of each weight.
    ends_exchanged = ends * ring / dp_link
    exchanged = dense_parameters * ring / dp_link + expert_parameters * expert_ring / expert_link
    reduced = np.where(single, _REDUCED[c.zero], _REDUCED_OF_PIPELINE[c.zero]) * exchanged
    reduced = reduced + np.where((c.zero == 3) & single, GRADIENT, 0.0) * ends_exchanged
    gathered = np.where(c.zero > 0, HALF, 0.0) * np.where((c.zero == 3) & single, ends_exchanged, exchanged)
    shards = np.where(c.zero >= 1, sharers, 1.0)
    updated = dense_parameters / shards + expert_parameters / np.where(c.zero >= 1, expert_replicas, 1.0)

    summed_over_copies = 2 * GRADIENT * updated * (copies - 1) / copies / sheet.bus(copies, tp * sharers)

    head = 2 * tokens * h * model.padded_vocab / tp
    head_operands = HALF * (tokens * (h + model.padded_vocab / tp) + embedding)
    p2p_bytes = hidden_bytes / tp  # scattered before, gathered after (2104.04473, §4.1)
    slowest_p2p, mean_p2p = sheet.boundaries(tp * cp * dp, pp)
    attention = causal * (1 + attention_again + BACKWARD) / wide_peak
    ones = np.ones_like(tp)
    return Work(
        num_microbatches=n,
        vp=vp,
        pp=pp,
        layers=layers * ones,
        stage_layers=stage_layers,
        last_layers=last_layers,
        expert_share=moe * ones,
        passes=passes,
        staged_tp=np.where(pp > 1, np.log2(tp), 0.0),
        layer_products=products * forward / peak,
        layer_operands=operands * forward / wide_peak,
        layer_attention=attention,
        layer_attention_token=causal_token * (1 + attention_again + BACKWARD) / wide_peak,
        layer_elementwise=elementwise * forward / memory,
        layer_tp=half * hidden_bytes * 2 * tp_seconds,
        layer_tp_messages=half * (by_tp + between_experts),
        # A ring sends keys and values round, and in the backward pass again, with their gradients. Gathered ones stay:
        # the backward pass scatters the gradients.
        layer_cp=((3 if context == "ring" else 2) + attention_again)
        * (kv_bytes * (cp - 1))
        / (sheet.ring_pass(cp, tp) if context == "ring" else sheet.bus(cp, tp)),
        layer_cp_cover=attention if context == "ring" else 0 * ones,
        # There and back.
        layer_ep=2 * passes * moe * hidden_bytes / tp * sheet.dispatch(dispatch, ep, etp, model.experts_per_token),
        layer_gather=gather,
        head_products=(1 + BACKWARD) * head / peak,
        head_operands=(1 + BACKWARD) * head_operands / wide_peak,
        head_elementwise=(1 + BACKWARD) * LOSS * tokens * model.padded_vocab / tp / memory,
        p2p=np.where(pp > 1, 2 * vp * p2p_bytes * slowest_p2p, 0.0),
        p2p_mean=np.where(pp > 1, 2 * vp * p2p_bytes * mean_p2p, 0.0),
        p2p_messages=np.where(pp > 1, 2 * vp, 0.0),
        dp_reduce=np.where(c.zero == 0, reduced, 0.0) + summed_over_copies,
        dp_scatter=np.where(c.zero == 0, 0.0, reduced),
        dp_gather=gathered,
        dp_messages=np.where(replicas > 1, np.log2(np.maximum(replicas, 1)), 0.0),
        optimizer=updated * np.where(c.offload_optimizer, HOST_OPTIMIZER_SECONDS, optimizer.update_bytes / memory),
        congestion=np.log2(sheet.nodes(sharers, tp)),
        nodes=np.log2(cluster.nodes) * ones,
        shared_node=float(cluster.accelerators_per_node > 1) * ones,
    )


class _Links:
    """Bandwidth, in bytes per second of each rank, of what a group of ranks that stand `stride` apart does."""

    def __init__(self, device: Accelerator, per_node: float) -> None:
        self.inside, self.between = device.inside_node.bytes_per_second, device.between_nodes.bytes_per_second
        self._per_node = per_node

    def nodes(self, size: Floats, stride: Floats) -> Floats:
        """Nodes that the group spans."""
        return np.maximum(np.ceil(size * stride / self._per_node), 1.0)

    def bus(self, size: Floats, stride: Floats) -> Floats:
        """Of a ring collective. There are as many rings as the group has members on a node, each of which leaves it
        through the link of another one: together they go out through all of these links."""
        outside = np.minimum(self._members(size, stride) * self.between, self.inside)
        return np.where(self._in_a_node(size, stride), self.inside, outside)

    def ring_pass(self, size: Floats, stride: Floats) -> Floats:
        """Of blocks that every rank hands to the next one: where the ring leaves a node it does so by one link, and all
        wait for that."""
        return np.where(self._in_a_node(size, stride), self.inside, min(self.between, self.inside))

    def dispatch(self, how: ExpertDispatch, ep: Floats, etp: Floats, experts: int) -> Floats:
        """Seconds per byte of a token on its way to its `experts`, which are spread evenly over `ep` ranks that stand
        `etp` apart: what leaves the node does so through the rank's own link, beside what stays."""
        if how == "allgather":
            return (etp * ep - 1) / self.bus(etp * ep, np.ones_like(ep))
        here, nodes = np.where(self._in_a_node(ep, etp), ep, self._members(ep, etp)), self.nodes(ep, etp)
        if how == "alltoall":
            return experts / ep * np.maximum((here - 1) / self.inside, (ep - here) / self.between)
        # Once to every other rank that has one of its experts, through its node's link.
        ranks, others = ((size - 1) * (1 - (1 - 1 / size) ** experts) for size in (ep, nodes))
        return np.maximum(ranks / self.inside, others / self.between)

    def boundaries(self, stage_ranks: Floats, stages: Floats) -> tuple[Floats, Floats]:
        """Seconds per byte between pipeline stages: of the slowest boundary, and the mean."""
        crossing = np.minimum((self.nodes(stages, stage_ranks) - 1) / np.maximum(stages - 1, 1.0), 1.0)
        mean = crossing / self.between + (1 - crossing) / self.inside
        return np.where(crossing > 0, max(1 / self.between, 1 / self.inside), 1 / self.inside), mean

    def _members(self, size: Floats, stride: Floats) -> Floats:
        """Ranks of the group on a node."""
        return np.clip(np.floor(self._per_node / stride), 1.0, size)

    def _in_a_node(self, size: Floats, stride: Floats) -> NDArray[np.bool_]:
        return np.asarray(size * stride <= self._per_node)
