"""Weights that a rank holds, on the pipeline stages that may be the fullest."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from profiles.configurations import Configurations
from profiles.memory.implementation import Implementation
from profiles.model_shape import ModelShape
from profiles.pipeline_split import split_layers

Floats = NDArray[np.float64]
Stage = Literal["first", "middle", "last"]
"""A stage that may be the fullest: the first has the embedding and the most micro-batches in flight, the second
(`middle`) may have more layers, the last has the output layer. All are the same rank if pp is 1."""
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Weights:
    """Numbers of weights on a rank, one entry a configuration, before ZeRO shares anything out."""

    dense: Floats
    """What is replicated over all dp · cp ranks: attention, dense MLPs, shared experts, routers, norms, embeddings."""
    experts: Floats
    """MLPs of experts, replicated over tp · dp · cp ÷ (etp · ep) ranks; 0 for a dense model."""
    embeddings: Floats
    """Weights in `dense` of the embeddings and the output layer."""
    vectors: Floats
    """Weights in `dense` of the norms and biases."""
    rows_and_columns: Floats
    """Rows and columns of all matrices, embeddings among them."""


class LayerWeights(NamedTuple):
    """Numbers of weights of one layer on a rank, one entry a configuration."""

    dense: Floats
    """As of `Weights`."""
    experts: Floats
    """As of `Weights`."""
    rows_and_columns: Floats
    """Of all matrices; tensor parallel ranks, or those of the experts, cut one side of each."""


def layer_weights(model: ModelShape, c: Configurations, *, experts: bool) -> LayerWeights:
    """A layer without experts, or one with them. Norms, the router, biases of projections into the residual stream, and
    latent attention's projections into narrow vectors are not split by tp."""
    split = model.attention_matrices - model.whole_attention_matrices + model.column_biases
    whole = model.whole_vectors + model.whole_attention_matrices
    cut, uncut = 2 * model.query_width + 2 * model.kv_width, 4 * model.hidden
    matrices = 3 if model.gated_mlp else 2
    if not experts:
        sides = (cut + matrices * model.ffn_hidden) / c.tp + uncut + matrices * model.hidden
        return LayerWeights((split + model.mlp_matrices) / c.tp + whole, np.zeros(len(c)), sides)
    dense = (split + model.shared_expert_matrices) / c.tp + whole + model.hidden * model.experts
    on_rank = model.experts / c.ep
    widths = on_rank * model.expert_width / c.expert_tp + model.shared_expert_hidden / c.tp
    mlps = on_rank + (model.shared_expert_hidden > 0)
    sides = cut / c.tp + matrices * widths + uncut + matrices * mlps * model.hidden + model.hidden + model.experts
    return LayerWeights(dense, model.expert_matrices * on_rank / c.expert_tp, sides)


def widest_mlp(model: ModelShape, c: Configurations) -> Floats:
    """Width of the widest MLP of a rank: a dense one, the shared expert or an expert."""
    has_dense = model.expert_layers < model.layers
    cut_by_tp = max(model.ffn_hidden * has_dense, model.shared_expert_hidden) / c.tp
    return np.maximum(cut_by_tp, model.expert_width / c.expert_tp) if model.experts else cut_by_tp


def largest_layer(model: ModelShape, c: Configurations) -> Floats:
    """Weights of the larger kind of layer on a rank."""
    kinds = [layer_weights(model, c, experts=True)] if model.experts else []
    kinds += [layer_weights(model, c, experts=False)] if model.expert_layers < model.layers else []
    return np.maximum.reduce([kind.dense + kind.experts for kind in kinds])


def stage_layers(model: ModelShape, c: Configurations, how: Implementation, stage: Stage) -> NDArray[np.int64]:
    """Layers of a stage. A count that no split of ours has is rounded up to whole chunks."""
    chunks = c.pp * c.vp
    if how.stages == "even":
        split = split_layers(model.layers, c.pp, c.vp)
        return np.where(split.possible, getattr(split, stage), -(-model.layers // chunks) * c.vp)
    head = model.padded_vocab * model.hidden / (model.matrices(model.experts_per_token) / model.layers)
    full = np.minimum(np.ceil((model.layers + head) / chunks).astype(np.int64) * c.vp, model.layers)
    full = np.where(c.pp == 1, model.layers, full)
    return np.maximum(model.layers - (c.pp - 1) * full, 0) if stage == "last" else full


def stage_weights(model: ModelShape, c: Configurations, how: Implementation, stage: Stage) -> Weights:
    """Weights of a rank on a stage.

    Tied embeddings lie on both ends of a pipeline (Megatron-LM, 2104.04473): tying saves nothing once pp > 1.
    """
    whole = c.pp == 1
    layers = np.where(whole, model.layers, stage_layers(model, c, how, stage))
    tables = np.where(whole, 1 if model.tied_embeddings else 2, int(stage != "middle"))
    norm = np.where(whole | (stage == "last"), model.norm_vectors * model.hidden, 0)
    positions = np.where(whole | (stage == "first"), model.position_embeddings, 0)
    embeddings = tables * embedding_weights(model, c) + positions
    vectors = layers * (model.whole_vectors + model.column_biases / c.tp) + norm
    of_embeddings = tables * (model.padded_vocab / c.tp + model.hidden)
    moe_layers = layers - _dense_layers(model, c, how, stage, layers) if model.experts else np.zeros_like(layers)
    plain, moe = layer_weights(model, c, experts=False), layer_weights(model, c, experts=True)
    dense = (layers - moe_layers) * plain.dense + moe_layers * moe.dense
    sides = (layers - moe_layers) * plain.rows_and_columns + moe_layers * moe.rows_and_columns
    return Weights(
        dense=dense + embeddings + norm,
        experts=moe_layers * moe.experts,
        embeddings=embeddings,
        vectors=vectors,
        rows_and_columns=sides + of_embeddings,
    )


def _dense_layers(
    model: ModelShape, c: Configurations, how: Implementation, stage: Stage, layers: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Of the `layers` of a stage of a model with experts those that have none. They are the model's first ones: a later
    stage has those that the stages before it have no room for."""
    before: NDArray[np.int64] = np.zeros_like(layers)
    if stage == "middle":
        before = stage_layers(model, c, how, "first")
    elif stage == "last":
        before = model.layers - layers
    return np.clip(model.dense_layers - np.where(c.pp == 1, 0, before), 0, layers)


def embedding_weights(model: ModelShape, c: Configurations) -> Floats:
    """Weights of the input embedding, or of the output layer, on a rank."""
    return model.padded_vocab * model.hidden / c.tp
