"""The parts of a rank's peak memory, by formula alone."""

import numpy as np
from numpy.typing import NDArray

from profiles.configurations import Configurations
from profiles.memory.activations import head_bytes, layer_activations, layers_in_flight, loss_bytes, rank_tokens
from profiles.memory.gathered import Passing, Units, fsdp_moments, in_backward_moments
from profiles.memory.implementation import Implementation
from profiles.memory.parameters import (
    Floats,
    Stage,
    Weights,
    embedding_weights,
    largest_layer,
    stage_weights,
    widest_mlp,
)
from profiles.model_shape import ModelShape
from profiles.optimizer_state import OptimizerState

COMPONENTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "working",
    "communication",
    "allocator",
)
"""Parts of a peak, as they are shown."""
WORKSPACE_BYTES = 64 * 2**20
"""Workspace of the matrix library, which PyTorch's allocator counts: 32 MiB for each of two handles on Hopper."""
ROUNDED_AT_ONCE = 2**20
"""Elements of a weight without a master that are rounded to bf16 at once, with random bits."""
ROUNDING_BYTES = 20
"""Of each of them: two numbers of 64 bits, and the rounded one in fp32."""


def kept_by_optimizer(weights: Weights, state: OptimizerState) -> Floats:
    """Numbers that an optimizer keeps of a rank's weights, before ZeRO shares anything out."""
    matrices = weights.dense + weights.experts - weights.embeddings - weights.vectors
    return (
        state.of_matrices * matrices
        + state.of_embeddings * weights.embeddings
        + state.of_vectors * weights.vectors
        + state.of_rows_and_columns * weights.rows_and_columns
    )


def stage_components(
    model: ModelShape, c: Configurations, precision: str, how: Implementation, stage: Stage
) -> dict[str, Floats]:
    """Bytes of each of `COMPONENTS` at the peak of a rank on a stage.

    Adam in mixed precision holds 2 + 4 + 12 bytes a weight: weight, fp32 gradient, fp32 master and two moments; in fp32
    4 + 4 + 8. Other optimizers keep other things than two moments (`OptimizerState`). ZeRO stage 1 shares the last out
    over dp · cp ranks, 2 the second too, 3 all (1910.02054, section 5); hybrid sharding does so among the ranks of one
    copy. FSDP has fp32 weights with the optimizer, and computes with copies of them.
    """
    element = 4 if precision == "fp32" else 2
    weights = stage_weights(model, c, how, stage)
    of_rank = np.maximum(weights.dense + weights.experts, 1)
    sharers = c.dp * c.cp // c.dp_replicate

    def share(zero: int) -> Floats:
        """Weights in this rank's share of what a ZeRO stage splits."""
        split = c.zero >= zero
        dense = weights.dense / np.where(split, sharers, 1)
        of_experts = np.maximum(sharers * c.tp // (c.expert_tp * c.ep), 1)
        return dense + weights.experts / np.where(split, of_experts, 1)

    gradient = 4 if how.fp32_gradients else element
    if element == 4:
        master = 0 if how.weights == "kept" else 4
    else:
        master = 4 if how.optimizer.masters else 0 if how.weights == "kept" else element
    numbers = kept_by_optimizer(weights, how.optimizer) / of_rank
    kept = (master + how.optimizer.bytes_of_number * numbers) * share(1)
    on_device = np.where(c.offload_optimizer, 0, 1)
    layer = layer_activations(model, c, element, how)
    head = (c.pp == 1) | (stage == "last")
    layer_update, root_update = (on_device * update for update in _update_bytes(model, c, how))
    passing = Passing(
        activations=layer.kept * layers_in_flight(model, c, how, stage),
        logits=np.where(head, head_bytes(model, c, element) + loss_bytes(model, c, element, how), 0),
        working=layer.recomputed + layer.passing,
        update=np.maximum(layer_update, root_update),
        layer_update=layer_update,
    )
    if how.weights == "gathered":
        table = embedding_weights(model, c)
        root = weights.embeddings + model.norm_vectors * model.hidden
        units = Units(weights.dense + weights.experts - root, largest_layer(model, c), root, table)
        moments = fsdp_moments(c, units, passing, element, gradient, model.layers)
        if how.optimizer_in_backward:
            other = in_backward_moments(units, passing, element, gradient, model.layers)
            moments = [*_of_rows(c.global_batch > 1, moments), *_of_rows(c.global_batch == 1, other)]
    else:
        state = {"weights": element * share(3), "gradients": on_device * gradient * share(2)}
        moments = [state | part for part in _kept_moments(model, c, how, element, weights, passing)]
    for moment in moments:
        moment["optimizer"] = on_device * kept
        moving = moment["activations"] + moment["logits"] + moment["working"] + moment["communication"]
        moment["allocator"] = WORKSPACE_BYTES + how.fragmentation * moving
    fullest = np.stack([np.add.reduce(list(moment.values())) for moment in moments]).argmax(axis=0)
    rows = np.arange(len(c))
    return {name: np.stack([moment[name] for moment in moments])[fullest, rows] for name in COMPONENTS}


def _of_rows(rows: NDArray[np.bool_], moments: list[dict[str, Floats]]) -> list[dict[str, Floats]]:
    """Moments that only some configurations have."""
    return [{name: np.where(rows, part, 0) for name, part in moment.items()} for moment in moments]


def _kept_moments(
    model: ModelShape, c: Configurations, how: Implementation, element: int, weights: Weights, passing: Passing
) -> list[dict[str, Floats]]:
    """What is there beside the state where the weights that the model computes with always are: in the backward pass,
    and in the update."""
    table, replicas = embedding_weights(model, c), c.dp * c.cp
    matrix = np.maximum(model.hidden * widest_mlp(model, c) * (2 if model.gated_mlp else 1), table)
    boundary = rank_tokens(model, c) * model.hidden * element / np.where(c.sequence_parallel, c.tp, 1)
    buckets = element * how.gradient_buckets * (replicas > 1) * (c.zero < 2) * (weights.dense + weights.experts)
    largest = np.maximum(largest_layer(model, c), table)
    nothing = np.zeros(len(c))
    backward = {
        "activations": passing.activations,
        "logits": passing.logits,
        # A gradient exists in the model's precision before it is added to where it is accumulated.
        "working": passing.working + element * np.where(c.zero < 2, matrix, 0),
        # A pipeline stage receives one tensor while it sends another. ZeRO-2 and -3 have the whole gradient of a layer
        # before it is reduced, ZeRO-3 the gathered weights of the layer that runs and of the next.
        "communication": buckets
        + np.where(c.pp > 1, 2 * boundary, 0)
        + element * largest * ((c.zero >= 2) + 2.0 * (c.zero >= 3)),
    }
    update = {
        "activations": nothing,
        "logits": nothing,
        "working": passing.update,
        "communication": buckets,
    }
    return [backward, update] if np.any(passing.update) else [backward]


def _update_bytes(model: ModelShape, c: Configurations, how: Implementation) -> tuple[Floats, Floats]:
    """What the update makes of the largest weight of a rank, and frees again: inside the layers, and outside."""
    state = how.optimizer
    sharers = np.where(c.zero >= 1, c.dp * c.cp // c.dp_replicate, 1)
    joint = 2 if model.gated_mlp and how.weights == "kept" else 1
    matrix = joint * model.hidden * widest_mlp(model, c) / sharers
    table = embedding_weights(model, c) / sharers
    copies = 0 if state.masters else 1 if how.fp32_gradients else 2

    def of(weight: Floats, scratch: float, parts: int) -> Floats:
        update = 4 * (copies + scratch) * weight
        if state.masters:
            return update
        return np.maximum(update, 4 * weight + ROUNDING_BYTES * np.minimum(weight / parts, ROUNDED_AT_ONCE))

    return of(matrix, state.scratch_of_matrices, joint), of(table, state.scratch_of_others, 1)
