"""The decoder of a job as transformers' own model, for the backends that train what people fine-tune and serve."""

import functools

import torch
import torch.nn.functional as functional
from torch.utils.checkpoint import checkpoint
from transformers import ArceeConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from copus.backends.initial_weights import initial_weight
from profiles.layout import Recompute
from profiles.model_shape import ModelShape


def causal_lm_config(shape: ModelShape) -> PretrainedConfig:
    """The model as transformers names it: Llama, or Arcee for a GELU MLP, which is Llama without the gate.

    Raises ValueError for a mixture of experts.
    """
    if shape.experts:
        raise ValueError(f"experts({shape.experts}): only dense models are built with transformers")
    family, activation = (LlamaConfig, "silu") if shape.gated_mlp else (ArceeConfig, "gelu")
    return family(
        vocab_size=shape.padded_vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        hidden_act=activation,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        tie_word_embeddings=shape.tied_embeddings,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def build_causal_lm(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int | None, recompute: Recompute = "none"
) -> PreTrainedModel:
    """The model on a device, which may be `meta`. Without a seed its weights are whatever lies in memory.

    `to_empty` of a model on `meta` loses what is no weight of its own: `restore_rotary_frequencies` comes next, and
    `model.tie_weights()` if embeddings are tied.
    """
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(causal_lm_config(shape), dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    if recompute == "full":
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif recompute == "selective":
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.forward = functools.partial(checkpoint, attention.forward, use_reentrant=False)
    if seed is not None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(initial_weight(name, weight.shape, shape.layers, seed, weight.device))
    return model


def restore_rotary_frequencies(model: PreTrainedModel) -> None:
    """Compute the frequencies of the rotary positions anew: they are buffers that no checkpoint has."""
    rotary = model.model.rotary_emb
    frequencies, _ = rotary.compute_default_rope_parameters(model.config)
    rotary.inv_freq.copy_(frequencies)
    rotary.original_inv_freq.copy_(frequencies)


def mean_loss(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in fp32, nats a token. `model` may be wrapped; tokens and labels are int64 of shape
    (sequences, seq_len), the labels one token ahead."""
    logits = model(input_ids=tokens).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
