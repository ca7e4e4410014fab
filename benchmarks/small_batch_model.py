"""Many small Llamas in one computation: what `benchmarks.small_batch` trains.

A model this small is bound by the calls of its operations on a CPU, not by their arithmetic. Runs that differ in seed
and learning rate alone make the same calls, so they are stacked: every weight has a leading axis of runs, and a product
of matrices is one batched product.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as functional

from copus.backends.huggingface import build_causal_lm
from copus.backends.initial_weights import initial_weight
from profiles.model_shape import ModelShape

Weights = dict[str, torch.Tensor]
"""By Hugging Face's name; shape (runs, …)."""


def stacked_weights(shape: ModelShape, seeds: Sequence[int]) -> Weights:
    """The weights that training begins with, one model for each seed, fp32."""
    shapes = {
        name: weight.shape
        for name, weight in build_causal_lm(shape, torch.float32, torch.device("meta"), None).named_parameters()
    }
    cpu = torch.device("cpu")
    return {
        name: torch.stack([initial_weight(name, size, shape.layers, seed, cpu) for seed in seeds])
        for name, size in shapes.items()
    }


def stacked_losses(shape: ModelShape, weights: Weights, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every run on its own sequences, nats a token: shape (runs,). `tokens` and `labels` are
    int64 of shape (runs, sequences, seq_len). A Llama without biases, padding and tied embeddings."""
    runs, sequences, length = tokens.shape
    width = shape.head_width
    turns = _rotations(length, width, shape.rope_base)

    def product(values: torch.Tensor, name: str) -> torch.Tensor:
        return torch.bmm(values, weights[name].transpose(1, 2))

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(values, (shape.hidden,), eps=shape.norm_epsilon) * weights[name][:, None]

    def heads(values: torch.Tensor, count: int) -> torch.Tensor:
        return values.view(runs * sequences, length, count, width).transpose(1, 2)

    flat = tokens.flatten(1) + torch.arange(runs)[:, None] * shape.padded_vocab
    x = functional.embedding(flat, weights["model.embed_tokens.weight"].flatten(0, 1))
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        h = norm(x, f"{name}.input_layernorm.weight")
        q, k, v = (
            heads(product(h, f"{name}.self_attn.{part}_proj.weight"), count)
            for part, count in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
        )
        q, k = _rotated(q, turns), _rotated(k, turns)
        k, v = (part.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for part in (k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(runs, sequences * length, -1)
        x = x + product(attended, f"{name}.self_attn.o_proj.weight")
        h = norm(x, f"{name}.post_attention_layernorm.weight")
        h = functional.silu(product(h, f"{name}.mlp.gate_proj.weight")) * product(h, f"{name}.mlp.up_proj.weight")
        x = x + product(h, f"{name}.mlp.down_proj.weight")
    logits = product(norm(x, "model.norm.weight"), "lm_head.weight")
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(runs, -1).mean(1)


def _rotations(length: int, width: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary positions (2104.09864): shape (length, width)."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotated(values: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Halves of a head's width are turned against one another, as transformers has them."""
    first, second = values.chunk(2, dim=-1)
    return values * turns[0] + torch.cat((-second, first), dim=-1) * turns[1]
