"""Weights that a rank holds, on the pipeline stages that may be the fullest."""

from dataclasses import dataclass
from typing import Literal, get_args

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
    """What is replicated over all dp · cp ranks: attention, dense MLPs, routers, norms, embeddings."""
    experts: Floats
    """MLPs of experts, replicated over dp · cp ÷ ep ranks; 0 for a dense model."""
    embeddings: Floats
    """Of `dense`, those of embeddings and of the output layer."""
    vectors: Floats
    """Of `dense`, those of norms and biases."""
    rows_and_columns: Floats
    """Rows and columns of all matrices, embeddings among them."""


def layer_weights(model: ModelShape, c: Configurations) -> tuple[Floats, Floats]:
    """(dense, expert) weights of one layer on a rank. Norms, the router, and biases of projections into the residual
    stream are not split by tp."""
    attention = (model.attention_matrices + model.column_biases) / c.tp
    whole = model.whole_vectors + model.hidden * model.experts
    if not model.experts:
        return attention + model.mlp_matrices / c.tp + whole, np.zeros(len(c))
    return attention + whole, model.mlp_matrices * model.experts / (c.tp * c.ep)


def stage_layers(model: ModelShape, c: Configurations, how: Implementation, stage: Stage) -> NDArray[np.int64]:
    """Layers of a stage. A count that no split of ours has is rounded up to whole chunks."""
    chunks = c.pp * c.vp
    if how.stages == "even":
        split = split_layers(model.layers, c.pp, c.vp)
        return np.where(split.possible, getattr(split, stage), -(-model.layers // chunks) * c.vp)
    copies = model.experts_per_token if model.experts else 1
    head = model.padded_vocab * model.hidden / (model.attention_matrices + copies * model.mlp_matrices)
    full = np.minimum(np.ceil((model.layers + head) / chunks).astype(np.int64) * c.vp, model.layers)
    full = np.where(c.pp == 1, model.layers, full)
    return np.maximum(model.layers - (c.pp - 1) * full, 0) if stage == "last" else full


def stage_weights(model: ModelShape, c: Configurations, how: Implementation, stage: Stage) -> Weights:
    """Weights of a rank on a stage.

    Tied embeddings lie on both ends of a pipeline (Megatron-LM, 2104.04473): tying saves nothing once pp > 1.
    """
    dense, experts = layer_weights(model, c)
    whole = c.pp == 1
    layers = np.where(whole, model.layers, stage_layers(model, c, how, stage))
    tables = np.where(whole, 1 if model.tied_embeddings else 2, int(stage != "middle"))
    norm = np.where(whole | (stage == "last"), model.norm_vectors * model.hidden, 0)
    positions = np.where(whole | (stage == "first"), model.position_embeddings, 0)
    embeddings = tables * embedding_weights(model, c) + positions
    vectors = layers * (model.whole_vectors + model.column_biases / c.tp) + norm
    of_embeddings = tables * (model.padded_vocab / c.tp + model.hidden)
    return Weights(
        dense=layers * dense + embeddings + norm,
        experts=layers * experts,
        embeddings=embeddings,
        vectors=vectors,
        rows_and_columns=layers * _layer_rows_and_columns(model, c) + of_embeddings,
    )


def embedding_weights(model: ModelShape, c: Configurations) -> Floats:
    """Weights of the input embedding, or of the output layer, on a rank."""
    return model.padded_vocab * model.hidden / c.tp


def _layer_rows_and_columns(model: ModelShape, c: Configurations) -> Floats:
    """Rows and columns of a layer's matrices on a rank. Tensor parallel ranks cut one side of each."""
    into_mlp, mlps = 2 if model.gated_mlp else 1, np.maximum(model.experts / c.ep, 1)
    of_mlps = mlps * (into_mlp + 1)
    cut = 2 * model.query_width + 2 * model.kv_width + of_mlps * model.ffn_hidden
    whole = (4 + of_mlps) * model.hidden + (model.hidden + model.experts) * (model.experts > 0)
    return np.asarray(cut / c.tp + whole, dtype=np.float64)
