"""What the forward pass keeps for the backward pass: per layer, per stage, and at the loss."""

from dataclasses import dataclass

import numpy as np

from profiles.configurations import RECOMPUTE, Configurations
from profiles.memory.implementation import Implementation, Module
from profiles.memory.parameters import STAGES, Floats, Stage, stage_layers
from profiles.model_shape import ModelShape


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer for one micro-batch on a rank, one entry a configuration."""

    kept: Floats
    """Kept from the forward to the backward pass."""
    recomputed: Floats
    """What recomputation makes again while the layer's backward pass runs."""
    passing: Floats
    """Gradients and gathered inputs that exist only while the layer's backward pass runs."""


def layer_activations(
    model: ModelShape, c: Configurations, element_bytes: int, how: Implementation
) -> LayerActivations:
    """Korthikanti et al. 2022 (2205.05198), eq. 1–4, spelled out for grouped queries, gated MLPs and experts.

    With element_bytes 2, dropout, materialised scores, ffn = 4 · hidden and as many kv_heads as heads, what is kept for
    a token is exactly theirs: h·(10 + 24/t + 5as/(ht)) bytes; all of it over t with sequence parallelism; without the
    last term when recomputing selectively; 2h when recomputing fully.
    """
    tokens = rank_tokens(model, c)
    hidden, query, e = model.hidden, model.query_width, element_bytes
    split = np.where(c.sequence_parallel, c.tp, 1)
    # Outside of the matrices that tp splits: inputs of the norms, two masks, inputs of the attention and of the MLP.
    inputs = 2 * e * hidden / (split if how.gathered_inputs == "regathered" else 1)
    outside = hidden * (model.norms_per_layer * e + 2 * how.dropout) / split + inputs
    if latent := model.latent_attention:  # narrow vectors before their norms, with the keys' rotated part, and after
        outside = outside + e * (2 * ((latent.query_rank or 0) + latent.kv_rank) + latent.rope_dim) / split
    # Heads: queries, keys, values, and the output, which is the input of the projection; and copies.
    kv_share = model.kv_heads / model.heads
    inputs_of_attention, results = _heads(model, how)
    heads = query * e * (inputs_of_attention + results + _copies_of_heads(model, how)) / c.tp
    # Keys and values of all context parallel ranks' tokens, and the results of the two pieces of each sequence beside
    # the whole.
    is_gathered = (c.cp > 1) & (how.context == "gathered")
    gathered = np.where(is_gathered, query * e * (1 + 2 * kv_share * c.cp) / c.tp, 0)
    instead = query * e * (2 + _copies_beside_gathered(model)) / c.tp
    scores: Floats = np.zeros(len(c))
    if how.attention == "flash":
        outside = outside + 4 * model.heads / c.tp  # fp32 log-sum-exp of each row of scores
    else:  # the softmax, and with dropout its mask and its result: 2, or 5 bytes of the paper
        scores = model.heads * model.seq_len * (e + (1 + e) * how.dropout) / c.tp
    # MLP: what enters the activation function, and the input of the second matrix.
    width = model.ffn_hidden  # of the MLPs that a token goes through; dense layers before those with experts are few
    if model.experts:
        width = model.experts_per_token * model.expert_width + model.shared_expert_hidden
    mlp = (how.gated_mlp_tensors if model.gated_mlp else 2) * width * e / c.tp
    if model.experts:  # tokens permuted to their experts and back, and the router's probabilities in fp32
        # The ranks that split an expert all have its tokens; the tensor parallel ranks share all tokens out.
        copies = (1 + (how.expert_outputs == "kept")) * c.expert_tp / c.tp
        mlp = mlp + copies * model.experts_per_token * hidden * e + 4 * model.experts
    inside = scores + gathered  # of attention, which selective recomputation runs again
    everything = outside + np.where(is_gathered, instead, heads) + inside + mlp
    modules: dict[Module, Floats] = {
        "norms": inputs * np.ones(len(c)),
        "activations": model.gated_mlp * width * e / c.tp,
        "latent": (model.latent_attention is not None) * ~is_gathered * query * e * inputs_of_attention / c.tp,
    }
    again = sum((modules[name] for name in how.recomputed_modules), start=np.zeros(len(c)))
    kinds = [c.recompute == RECOMPUTE.index(name) for name in ("none", "selective", "full")]
    kept = np.select(kinds, [everything - again, outside + heads + mlp - again, hidden * e / split])
    recomputed = np.select(kinds, [again, inside + again, everything])
    # The widest moment of the backward pass: gradients of the MLP's wide tensors, and the input that is gathered again,
    # with its gradient; or, with gathered keys and values, theirs, whose parts are added up.
    passing = (3 if model.gated_mlp else 2) * width * e / c.tp + 2 * hidden * e
    passing = np.maximum(passing, 2 * query * e / c.tp + 3 * gathered)
    return LayerActivations(kept=tokens * kept, recomputed=tokens * recomputed, passing=tokens * passing)


def _heads(model: ModelShape, how: Implementation) -> tuple[float, float]:
    """Queries, keys and values that attention reads, and its results, in units of the queries."""
    if model.latent_attention is None:
        return 1 + 2 * model.kv_heads / model.heads, 1
    narrow = model.latent_attention.value_dim / model.head_width
    if how.narrow_values == "as they are":
        return 2 + narrow, narrow
    return 3, 1 + narrow * (narrow < 1)


def _copies_of_heads(model: ModelShape, how: Implementation) -> float:
    """Queries and keys as they leave the projection, if they are kept beside what attention reads, in units of the
    queries."""
    if model.latent_attention is not None:  # put together from what is rotated and what is not, which nothing needs
        return 0.0
    both = 1 + model.kv_heads / model.heads
    is_normed, is_rotated = model.qk_norm != "none", model.positions == "rope"
    if how.fused_qkv == "released":
        return both * is_normed
    # Queries that share keys lie apart in the joint output, and are copied first of all: a norm keeps its input.
    regrouped = float(model.kv_heads < model.heads)
    if is_normed:
        return both + regrouped
    return both if is_rotated else regrouped


def _copies_beside_gathered(model: ModelShape) -> float:
    """The same on the megatron backend where keys and values are gathered, which are copies: of the joint output what
    is kept for a norm, or for queries that are views into it."""
    joint, regrouped = 1 + 2 * model.kv_heads / model.heads, float(model.kv_heads < model.heads)
    if model.qk_norm != "none":
        return joint + regrouped
    return 0.0 if model.positions == "rope" or regrouped else joint - 1


def rank_tokens(model: ModelShape, c: Configurations) -> Floats:
    """Tokens of a micro-batch on a rank: context parallelism splits the sequence."""
    return c.micro_batch * model.seq_len / c.cp


def layers_in_flight(model: ModelShape, c: Configurations, how: Implementation, stage: Stage) -> Floats:
    """Layers × micro-batches whose activations a stage keeps at its fullest.

    1F1B: min(n, pp − stage) micro-batches of layers ÷ pp each (2104.04473, section 2.2.1). Interleaved: 2·(pp − stage −
    1) + (vp − 1)·pp + 1 chunks of layers ÷ (pp · vp), which on the first stage is layers · (1 + (pp − 1)/(pp · vp))
    (2205.05198, section 4.2.3).
    """
    at = np.minimum(STAGES.index(stage), c.pp - 1) if stage != "last" else c.pp - 1
    later = c.pp - 1 - at
    chunks = np.where(c.vp > 1, 2 * later + (c.vp - 1) * c.pp + 1, later + 1)
    return np.minimum(chunks, c.num_microbatches * c.vp) * (stage_layers(model, c, how, stage) / c.vp)


def loss_bytes(model: ModelShape, c: Configurations, element_bytes: int, how: Implementation) -> Floats:
    """Logits and what the loss makes of them, for a micro-batch on the last stage; the vocabulary is split by tp.

    In place: the model's precision and fp32 are there at once, forward and backward. Copying: two more in fp32.
    """
    copies = (element_bytes if element_bytes < 4 else 0) + 4 + 8 * (how.loss == "copying")
    return rank_tokens(model, c) * model.padded_vocab * copies / c.tp


def head_bytes(model: ModelShape, c: Configurations, element_bytes: int) -> Floats:
    """Inputs of the last norm and of the output layer (2205.05198, section 4.3)."""
    split = np.where(c.sequence_parallel, c.tp, 1)
    return rank_tokens(model, c) * 2 * element_bytes * model.hidden / split
