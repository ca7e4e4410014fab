"""The parts of a rank's peak memory, by formula alone."""

import numpy as np

from profiles.configurations import Configurations
from profiles.memory.activations import head_bytes, layer_activations, layers_in_flight, loss_bytes, rank_tokens
from profiles.memory.implementation import Implementation
from profiles.memory.parameters import Floats, Stage, embedding_weights, layer_weights, stage_weights
from profiles.model_shape import ModelShape

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


def stage_components(
    model: ModelShape, c: Configurations, precision: str, how: Implementation, stage: Stage
) -> dict[str, Floats]:
    """Bytes of each of `COMPONENTS` at the peak of a rank on a stage.

    Adam in mixed precision holds 2 + 4 + 12 bytes a weight: weight, fp32 gradient, fp32 master and two moments; in fp32
    4 + 4 + 8. ZeRO stage 1 shares the last out over dp · cp ranks, 2 the second too, 3 all (1910.02054, section 5);
    hybrid sharding does so among the ranks of one copy. FSDP has fp32 weights with the optimizer, and computes with
    copies of them.
    """
    element = 4 if precision == "fp32" else 2
    weights = stage_weights(model, c, how, stage)
    replicas = c.dp * c.cp

    def share(zero: int) -> Floats:
        """Weights in this rank's share of what a ZeRO stage splits."""
        split, sharers = c.zero >= zero, replicas // c.dp_replicate
        dense = weights.dense / np.where(split, sharers, 1)
        return dense + weights.experts / np.where(split, np.maximum(sharers // c.ep, 1), 1)

    table = embedding_weights(model, c)
    largest = np.maximum(np.add(*layer_weights(model, c)), table)
    matrix = np.maximum(model.hidden * model.ffn_hidden * (2 if model.gated_mlp else 1) / c.tp, table)
    gradient = 4 if how.fp32_gradients else element
    buckets = element * how.gradient_buckets * (replicas > 1) * (c.zero < 2)
    layer = layer_activations(model, c, element, how)
    head = (c.pp == 1) | (stage == "last")
    boundary = rank_tokens(model, c) * model.hidden * element / np.where(c.sequence_parallel, c.tp, 1)
    found = {
        "weights": element * (np.where(c.zero < 3, share(3), 0) if how.weights == "gathered" else share(3)),
        "gradients": gradient * share(2),
        "optimizer": (8 if element == 4 and how.weights == "kept" else 12) * share(1),
        "activations": layer.kept * layers_in_flight(model, c, how, stage),
        "logits": np.where(head, head_bytes(model, c, element) + loss_bytes(model, c, element, how), 0),
        # A gradient exists in the model's precision before it is added to where it is accumulated.
        "working": layer.recomputed + layer.passing + element * np.where(c.zero < 2, matrix, 0),
        # ZeRO-2 and -3 have the whole gradient of a layer before it is reduced, ZeRO-3 the gathered weights of the
        # layer that runs and of the next. A pipeline stage receives one tensor while it sends another.
        "communication": buckets * (weights.dense + weights.experts)
        + element * largest * ((c.zero >= 2) + 2.0 * (c.zero >= 3))
        + np.where(c.pp > 1, 2 * boundary, 0),
    }
    moving = found["activations"] + found["logits"] + found["working"] + found["communication"]
    found["allocator"] = WORKSPACE_BYTES + how.fragmentation * moving
    return found
