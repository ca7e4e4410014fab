"""Megatron's weights as the Hugging Face tensors that they consist of.

The state of a job has Hugging Face's names on every backend, so that a checkpoint of one backend is a checkpoint of
all. Megatron keeps the projections of queries, keys and values in one matrix (`linear_qkv`: queries, key and value of
the first group of heads that share a key, then those of the second, and so on), and the gate and up projections in
another (`linear_fc1`), one below the other. So every Hugging Face tensor consists of whole rows of a Megatron tensor.
Both frameworks rotate the first half of a head against the second, so no rows within a head are permuted. Experts have
the names of Qwen 3 and DeepSeek: `mlp.gate`, `mlp.experts.7.gate_proj`, `mlp.shared_experts.gate_proj`. Latent
attention has those of DeepSeek, which rotates neighbouring dimensions of a head, as Megatron's does.

A weight without a counterpart here keeps Megatron's name: moves and checkpoints of this backend carry it, and other
backends refuse it.
"""

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from copus.reshard.boxes import Box
from profiles.model_shape import ModelShape

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)\.(weight|bias|expert_bias)")
_MLP = re.compile(r"(mlp(?:\.experts\.local_experts\.\d+|\.shared_experts)?)\.linear_fc([12])")
"""A dense MLP, an expert (by its number among all experts), or the shared one."""
_IN_A_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.linear_proj.post_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2.post_layernorm": "post_feedforward_layernorm",
    "mlp.router": "mlp.gate",
}
_NORM_BEFORE_MLP = {"pre": "post_attention_layernorm", "both": "pre_feedforward_layernorm"}
"""By `norm_position`: Llama's name of the norm before the MLP is that of another norm where there are norms after
attention and MLP too."""
_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "embedding.position_embeddings.weight": "model.embed_positions.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    "output_layer.weight": "lm_head.weight",
}


FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Transformer Engine's names of norms that are fused with the projection behind them, and Megatron's of the same norms
as modules of their own."""
FUSED_LATENT_NORMS = {
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}
"""Likewise the norms within latent attention."""
_GROUPED_EXPERT = re.compile(r"\.mlp\.experts\.linear_fc([12])\.(weight|bias)(\d+)$")
"""A weight of the experts of a rank, which are one module."""


def without_fusion(name: str) -> str:
    """Megatron's name of a weight, from that in a layer of Transformer Engine's modules; other names as they are."""
    for fused, own in (FUSED_NORMS | FUSED_LATENT_NORMS).items():
        name = name.replace(fused, own)
    return _GROUPED_EXPERT.sub(r".mlp.experts.local_experts.\3.linear_fc\1.\2", name)


class Part(NamedTuple):
    """Part of a Megatron tensor that lies in one Hugging Face tensor."""

    box: Box
    """In Megatron's whole tensor."""
    name: str
    """Of the Hugging Face tensor."""
    shape: tuple[int, ...]
    """Of the whole Hugging Face tensor."""
    offset: tuple[int, ...]
    """Where the part begins in that."""


class _Rows(NamedTuple):
    """Consecutive rows of a Megatron tensor that are consecutive rows of a Hugging Face tensor."""

    first: int
    """In Megatron's tensor."""
    length: int
    name: str
    """Of the Hugging Face tensor."""
    height: int
    """Rows of the whole Hugging Face tensor."""
    start: int
    """First of these rows in the Hugging Face tensor."""


def hugging_face_parts(name: str, shape: tuple[int, ...], box: Box, model: ModelShape) -> Iterator[Part]:
    """A box of a whole Megatron tensor, cut where Hugging Face tensors begin and end."""
    if not shape:
        yield Part(box, name, shape, ())
        return
    height, *width = shape
    is_latent = model.latent_attention is not None
    for rows in _rows_of(name, height, model.heads, model.kv_heads, model.gated_mlp, model.norm_position, is_latent):
        common = box.intersect(Box((rows.first, *[0] * len(width)), (rows.length, *width)))
        if common is not None:
            offset = (common.offset[0] - rows.first + rows.start, *common.offset[1:])
            yield Part(common, rows.name, (rows.height, *width), offset)


@functools.lru_cache(maxsize=2**16)
def _rows_of(
    name: str, height: int, heads: int, kv_heads: int, gated_mlp: bool, norm_position: str, is_latent: bool
) -> tuple[_Rows, ...]:
    """The rows of a whole Megatron tensor, from the first to the last."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return (_Rows(0, height, _OUTSIDE.get(name, name), height, 0),)
    layer, module, kind = match.groups()
    prefix = f"model.layers.{layer}"
    if module == "self_attention.linear_qkv" and height % (heads + 2 * kv_heads) == 0:
        return tuple(_query_key_value(f"{prefix}.self_attn", kind, height // (heads + 2 * kv_heads), heads, kv_heads))
    mlp = _MLP.fullmatch(module)
    if mlp is not None:
        within, half = f"{prefix}.{mlp[1].replace('.local_experts', '')}", height // 2
        if mlp[2] == "1" and gated_mlp and height % 2 == 0:
            projections = ((0, "gate_proj"), (half, "up_proj"))
            return tuple(_Rows(first, half, f"{within}.{which}.{kind}", half, 0) for first, which in projections)
        which = "down_proj" if mlp[2] == "2" else "up_proj"
        return (_Rows(0, height, f"{within}.{which}.{kind}", height, 0),)
    if module == "pre_mlp_layernorm" and norm_position in _NORM_BEFORE_MLP:
        return (_Rows(0, height, f"{prefix}.{_NORM_BEFORE_MLP[norm_position]}.{kind}", height, 0),)
    if module == "self_attention.q_layernorm" and is_latent:  # of the vector that all queries are made of
        return (_Rows(0, height, f"{prefix}.self_attn.q_a_layernorm.{kind}", height, 0),)
    kind = "e_score_correction_bias" if kind == "expert_bias" else kind
    renamed = f"{prefix}.{_IN_A_LAYER[module]}.{kind}" if module in _IN_A_LAYER else name
    return (_Rows(0, height, renamed, height, 0),)


def _query_key_value(prefix: str, kind: str, width: int, heads: int, kv_heads: int) -> Iterator[_Rows]:
    """`width` is that of a head."""
    first = 0
    for group in range(kv_heads):
        for which, heads_of_group in (("q_proj", heads // kv_heads), ("k_proj", 1), ("v_proj", 1)):
            length = heads_of_group * width
            yield _Rows(first, length, f"{prefix}.{which}.{kind}", kv_heads * length, group * length)
            first += length
