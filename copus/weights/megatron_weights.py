"""Every weight of Megatron-LM's GPT and its shape, for a model. No torch."""

import itertools
from collections.abc import Iterator

from copus.weights.families import Shapes, linear, norm
from profiles.latent_attention import LatentAttention
from profiles.model_shape import ModelShape


def weights_in_megatron(model: ModelShape) -> Shapes:
    """Every weight of Megatron-LM's GPT, under the names that a layer of copus's own specification has.

    Raises ValueError for a model that Megatron-LM's GPT does not have.
    """
    if model.norm_position != "pre":
        raise ValueError(f"model.norm_position({model.norm_position}) is not exported to Megatron-LM: pre is")
    if model.qk_norm == "projection":
        raise ValueError("model.qk_norm(projection) is not exported to Megatron-LM: none and head are")
    return dict(_weights(model))


def _weights(model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = model.hidden
    yield "embedding.word_embeddings.weight", (model.padded_vocab, hidden)
    if model.positions == "learned":
        yield "embedding.position_embeddings.weight", (model.seq_len, hidden)
    latent = model.latent_attention
    for number in range(model.layers):
        is_dense = not model.experts or number < model.dense_layers
        of_a_layer = (
            norm(model, "input_layernorm", hidden),
            norm(model, "pre_mlp_layernorm", hidden),
            _attention(model) if latent is None else _latent_attention(model, latent),
            _mlp("mlp", model.ffn_hidden, model) if is_dense else _experts(model),
        )
        for name, shape in itertools.chain.from_iterable(of_a_layer):
            yield f"decoder.layers.{number}.{name}", shape
    yield from norm(model, "decoder.final_layernorm", hidden)
    if not model.tied_embeddings:
        yield "output_layer.weight", (model.padded_vocab, hidden)


def _attention(model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    within, queries = "self_attention.", model.query_width
    yield from linear(f"{within}linear_qkv", queries + 2 * model.kv_width, model.hidden, model.bias != "none")
    yield from linear(f"{within}linear_proj", model.hidden, queries, model.bias in ("attention", "all"))
    if model.qk_norm == "head":
        yield from norm(model, f"{within}q_layernorm", model.head_width)
        yield from norm(model, f"{within}k_layernorm", model.head_width)


def _latent_attention(model: ModelShape, latent: LatentAttention) -> Iterator[tuple[str, tuple[int, ...]]]:
    within, heads, kept = "self_attention.", model.heads, model.head_width - latent.rope_dim
    if latent.query_rank:
        yield from linear(f"{within}linear_q_down_proj", latent.query_rank, model.hidden)
        yield from norm(model, f"{within}q_layernorm", latent.query_rank)
        yield from linear(f"{within}linear_q_up_proj", model.query_width, latent.query_rank)
    else:
        yield from linear(f"{within}linear_q_proj", model.query_width, model.hidden)
    yield from linear(f"{within}linear_kv_down_proj", latent.kv_rank + latent.rope_dim, model.hidden)
    yield from norm(model, f"{within}kv_layernorm", latent.kv_rank)
    yield from linear(f"{within}linear_kv_up_proj", heads * (kept + latent.value_dim), latent.kv_rank)
    yield from linear(f"{within}linear_proj", model.hidden, heads * latent.value_dim)


def _mlp(module: str, width: int, model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    has_bias = model.bias == "all"
    yield from linear(f"{module}.linear_fc1", width * (2 if model.gated_mlp else 1), model.hidden, has_bias)
    yield from linear(f"{module}.linear_fc2", model.hidden, width, has_bias)


def _experts(model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from linear("mlp.router", model.experts, model.hidden, model.bias == "all")
    if model.router.bias_update_rate:
        yield "mlp.router.expert_bias", (model.experts,)
    for expert in range(model.experts):
        yield from _mlp(f"mlp.experts.local_experts.{expert}", model.expert_width, model)
    if model.shared_expert_hidden:
        yield from _mlp("mlp.shared_experts", model.shared_expert_hidden, model)
