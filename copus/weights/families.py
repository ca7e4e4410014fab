"""The weights of a model, and how each family of Hugging Face stores them. No torch.

In the state of a job weights have the names that Hugging Face gives those of Llama, and for norms and experts those of
OLMo 2, Gemma 2 and Qwen 3. A folder of another family has some of them under other names, fused, transposed, or as
differences to 1.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from profiles.model_shape import ModelShape

Shapes = dict[str, tuple[int, ...]]
"""Whole shapes of tensors, by name."""

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
"""The weights with a row for each token of the vocabulary."""


def weights_of(model: ModelShape) -> Shapes:
    """Every weight in the state of a job, without the rows that pad the vocabulary."""
    return dict(_weights_of(model))


def state_shape(name: str, shape: tuple[int, ...], model: ModelShape) -> tuple[int, ...]:
    """The shape that a weight of this name has in the state of a job: with the rows that pad the vocabulary."""
    return (model.padded_vocab, *shape[1:]) if name in _EMBEDDINGS else shape


def _weights_of(model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = model.hidden
    yield "model.embed_tokens.weight", (model.vocab, hidden)
    if model.positions == "learned":
        yield "model.embed_positions.weight", (model.seq_len, hidden)
    for layer in range(model.layers):
        for name, shape in _weights_of_layer(model, layer):
            yield f"model.layers.{layer}.{name}", shape
    yield from norm(model, "model.norm", hidden)
    if not model.tied_embeddings:
        yield "lm_head.weight", (model.vocab, hidden)


def _weights_of_layer(model: ModelShape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = model.hidden
    norms = {
        "pre": ("input_layernorm", "post_attention_layernorm"),
        "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "both": (
            *("input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
    }
    for name in norms[model.norm_position]:
        yield from norm(model, name, hidden)
    yield from _latent_attention(model) if model.latent_attention else _attention(model)
    has_bias = model.bias == "all"
    widths = {"mlp": model.ffn_hidden}
    if model.experts and layer >= model.dense_layers:
        yield from linear("mlp.gate", model.experts, hidden, has_bias)
        if model.router.bias_update_rate:
            yield "mlp.gate.e_score_correction_bias", (model.experts,)
        widths = {f"mlp.experts.{expert}": model.expert_width for expert in range(model.experts)}
        if model.shared_expert_hidden:
            widths["mlp.shared_experts"] = model.shared_expert_hidden
    for mlp, width in widths.items():
        if model.gated_mlp:
            yield from linear(f"{mlp}.gate_proj", width, hidden, has_bias)
        yield from linear(f"{mlp}.up_proj", width, hidden, has_bias)
        yield from linear(f"{mlp}.down_proj", hidden, width, has_bias)


def _attention(model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, query, kv, has_bias = model.hidden, model.query_width, model.kv_width, model.bias != "none"
    yield from linear("self_attn.q_proj", query, hidden, has_bias)
    yield from linear("self_attn.k_proj", kv, hidden, has_bias)
    yield from linear("self_attn.v_proj", kv, hidden, has_bias)
    yield from linear("self_attn.o_proj", hidden, query, model.bias in ("attention", "all"))
    if model.qk_norm != "none":
        of_heads = model.qk_norm == "head"
        yield from norm(model, "self_attn.q_norm", model.head_width if of_heads else query)
        yield from norm(model, "self_attn.k_norm", model.head_width if of_heads else kv)


def _latent_attention(model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, queries, latent = model.hidden, model.query_width, model.latent_attention
    assert latent is not None, "asked for"
    if latent.query_rank:
        yield "self_attn.q_a_proj.weight", (latent.query_rank, hidden)
        yield from norm(model, "self_attn.q_a_layernorm", latent.query_rank)
        yield "self_attn.q_b_proj.weight", (queries, latent.query_rank)
    else:
        yield "self_attn.q_proj.weight", (queries, hidden)
    of_a_head = model.head_width - latent.rope_dim + latent.value_dim
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent.kv_rank + latent.rope_dim, hidden)
    yield from norm(model, "self_attn.kv_a_layernorm", latent.kv_rank)
    yield "self_attn.kv_b_proj.weight", (model.heads * of_a_head, latent.kv_rank)
    yield "self_attn.o_proj.weight", (hidden, model.heads * latent.value_dim)


def linear(name: str, outputs: int, inputs: int, has_bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights of a linear layer, with their shapes."""
    yield f"{name}.weight", (outputs, inputs)
    if has_bias:
        yield f"{name}.bias", (outputs,)


def norm(model: ModelShape, name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights of a norm, with their shapes."""
    yield f"{name}.weight", (width,)
    if model.norm == "layernorm":
        yield f"{name}.bias", (width,)


class Stored(NamedTuple):
    """Where a weight of the state is in a Hugging Face folder: some rows of a tensor."""

    name: str
    """Name of the tensor in the file."""
    shape: tuple[int, ...]
    """Shape of the tensor in the file."""
    first_row: int = 0
    """First row of the weight in the tensor, after it has been transposed if it is."""
    is_transposed: bool = False
    """Whether the file has inputs × outputs, as GPT-2's does."""
    subtracted: float = 0.0
    """How much less than the weight the file has: 1 for the norms of families that multiply by 1 + weight."""


def stored_weights(family: str, model: ModelShape) -> dict[str, Stored]:
    """Where a folder of a family (its `model_type`) has each weight of the state, by the weight's name."""
    weights = weights_of(model)
    if family == "gpt2":
        return dict(_gpt2(weights))
    fused = _PHI3 if family == "phi3" else {}
    return {name: _stored(family, fused, name, weights) for name in weights}


_PHI3 = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Fused projections, one below the other."""
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (r"mlp\.gate\.", "block_sparse_moe.gate."),
        (r"mlp\.experts\.(\d+)\.gate_proj\.", r"block_sparse_moe.experts.\1.w1."),
        (r"mlp\.experts\.(\d+)\.up_proj\.", r"block_sparse_moe.experts.\1.w3."),
        (r"mlp\.experts\.(\d+)\.down_proj\.", r"block_sparse_moe.experts.\1.w2."),
    ),
    "starcoder2": ((r"mlp\.up_proj\.", "mlp.c_fc."), (r"mlp\.down_proj\.", "mlp.c_proj.")),
}
_NORMS_LESS_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron")


def _stored(family: str, fused: dict[str, tuple[str, ...]], name: str, weights: Shapes) -> Stored:
    for whole, parts in fused.items():
        part = next((part for part in parts if f".{part}." in name), None)
        if part is not None:
            rows = [weights[name.replace(part, other)][0] for other in parts]
            shape = (sum(rows), *weights[name][1:])
            return Stored(name.replace(part, whole), shape, sum(rows[: parts.index(part)]))
    renamed = name
    for pattern, replacement in _RENAMED.get(family, ()):
        renamed = re.sub(pattern, replacement, renamed)
    is_norm = name.endswith("norm.weight")
    return Stored(renamed, weights[name], subtracted=1.0 if is_norm and family in _NORMS_LESS_ONE else 0.0)


_GPT2 = {
    "model.embed_tokens": "wte",
    "model.embed_positions": "wpe",
    "model.norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_OF_QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _gpt2(weights: Shapes) -> Iterator[tuple[str, Stored]]:
    """Matrices of layers are inputs × outputs, and those of queries, keys and values are one."""
    for name, shape in weights.items():
        module, _, kind = name.rpartition(".")
        place, first_row, rows = "", 0, shape[0]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        if match:
            place, module = f"h.{match[1]}.", match[2]
        if module in _OF_QUERY_KEY_VALUE:
            first_row, rows = _OF_QUERY_KEY_VALUE.index(module) * shape[0], 3 * shape[0]
            stored = f"transformer.{place}attn.c_attn.{kind}"
        elif module in _GPT2:
            stored = f"transformer.{place}{_GPT2[module]}.{kind}"
        else:  # an output layer that is not tied
            stored = name
        is_transposed = match is not None and len(shape) == 2
        whole = (shape[1], rows) if is_transposed else (rows, *shape[1:])
        yield name, Stored(stored, whole, first_row, is_transposed)
