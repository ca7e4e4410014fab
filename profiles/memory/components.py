"""The parts of a rank's peak memory, by formula alone."""

import numpy as np
from numpy.typing import NDArray

from profiles.configurations import Configurations
from profiles.memory.activations import head_bytes, layer_activations, layers_in_flight, loss_bytes, rank_tokens
from profiles.memory.implementation import Implementation
from profiles.memory.parameters import Floats, Stage, Weights, embedding_weights, largest_layer, stage_weights
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
    replicas = c.dp * c.cp

    def share(zero: int) -> Floats:
        """Weights in this rank's share of what a ZeRO stage splits."""
        split, sharers = c.zero >= zero, replicas // c.dp_replicate
        dense = weights.dense / np.where(split, sharers, 1)
        return dense + weights.experts / np.where(split, np.maximum(sharers // c.ep, 1), 1)

    table = embedding_weights(model, c)
    of_a_layer = largest_layer(model, c)
    largest = np.maximum(of_a_layer, table)
    widest = max(model.ffn_hidden, model.shared_expert_hidden)
    matrix = np.maximum(model.hidden * widest * (2 if model.gated_mlp else 1) / c.tp, table)
    gradient = 4 if how.fp32_gradients else element
    buckets = element * how.gradient_buckets * (replicas > 1) * (c.zero < 2)
    layer = layer_activations(model, c, element, how)
    head = (c.pp == 1) | (stage == "last")
    boundary = rank_tokens(model, c) * model.hidden * element / np.where(c.sequence_parallel, c.tp, 1)
    on_device = np.where(c.offload_optimizer, 0, 1)
    if element == 4:
        master = 0 if how.weights == "kept" else 4
    else:
        master = 4 if how.optimizer.masters else 0 if how.weights == "kept" else element
    kept = master * share(1) + 4 * kept_by_optimizer(weights, how.optimizer) * share(1) / of_rank
    components = {
        "weights": element * (np.where(c.zero < 3, share(3), 0) if how.weights == "gathered" else share(3)),
        "gradients": on_device * gradient * share(2),
        "optimizer": on_device * kept,
        "activations": layer.kept * layers_in_flight(model, c, how, stage),
        "logits": np.where(head, head_bytes(model, c, element) + loss_bytes(model, c, element, how), 0),
        # A gradient exists in the model's precision before it is added to where it is accumulated.
        "working": layer.recomputed + layer.passing + element * np.where(c.zero < 2, matrix, 0),
        # A pipeline stage receives one tensor while it sends another.
        "communication": buckets * (weights.dense + weights.experts) + np.where(c.pp > 1, 2 * boundary, 0),
    }
    if how.weights == "gathered":
        others = components["activations"] + components["logits"] + components["working"]
        components["communication"] += _gathered_bytes(model, c, element, of_a_layer, others)
    else:
        # ZeRO-2 and -3 have the whole gradient of a layer before it is reduced, ZeRO-3 the gathered weights of the
        # layer that runs and of the next.
        components["communication"] += element * largest * ((c.zero >= 2) + 2.0 * (c.zero >= 3))
    moving = components["activations"] + components["logits"] + components["working"] + components["communication"]
    components["allocator"] = WORKSPACE_BYTES + how.fragmentation * moving
    return components


def _gathered_bytes(
    model: ModelShape, c: Configurations, element: int, layer: Floats, others: Floats
) -> NDArray[np.float64]:
    """What FSDP gathers with ZeRO-3, and the whole gradients that it has from ZeRO-2 on before it reduces them in fp32.

    Embedding, last norm and output layer are one unit, the root: gathered from the forward pass to the end of the
    backward pass, and reduced at its end. So there are two moments that may be the fullest. While layers run, there are
    the root, the gradient of the output layer, two gathered layers, and a layer's gradient with its fp32 copy. At the
    end there are the root, its gradient and the fp32 copy of that; `others`, bytes of activations and the like, are
    gone by then.
    """
    table = embedding_weights(model, c)
    root = table * (1 if model.tied_embeddings else 2)
    gathers, reduces = c.zero >= 3, c.zero >= 2
    in_layers = gathers * element * (root + 2 * layer) + reduces * (element * table + (element + 4) * layer)
    at_the_end = gathers * element * root + reduces * (element + 4) * root
    return np.asarray(np.maximum(in_layers, at_the_end - others), dtype=np.float64)
