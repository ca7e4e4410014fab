"""The decoder of a job as transformers' own model, for the backends that train what people fine-tune and serve."""

import functools
from typing import Any

import torch
import torch.nn.functional as functional
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from copus.backends.huggingface_description import family_of
from copus.backends.initial_weights import initial_weight
from copus.backends.microbatches import hidden_scores
from copus.backends.step_contract import NOT_COUNTED
from copus.backends.vocabulary import hide_padding
from profiles.layout import Recompute
from profiles.model_shape import ModelShape
from profiles.rope import attention_factor

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "squared_relu": "relu2"}


def causal_lm_config(shape: ModelShape) -> PretrainedConfig:
    """The model as transformers names it.

    Raises ValueError for a model that no family has, as `family_of`.
    """
    return AutoConfig.for_model(
        family_of(shape),
        vocab_size=shape.padded_vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        hidden_act=_ACTIVATIONS[shape.mlp_activation],
        attention_bias=shape.bias in ("attention", "all"),
        mlp_bias=shape.bias == "all",
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters=_rope_parameters(shape),
        tie_word_embeddings=shape.tied_embeddings,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def _rope_parameters(shape: ModelShape) -> dict[str, Any]:
    scaling = shape.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": shape.rope_base}
    parameters: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": shape.rope_base, "factor": scaling.factor}
    names: dict[str, Any] = {"original_max_position_embeddings": scaling.original_seq_len}
    if scaling.kind == "llama3":
        names |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    elif scaling.kind == "yarn":
        names |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        names |= {"attention_factor": attention_factor(scaling)}
    return parameters | (names if scaling.kind != "linear" else {})


def build_causal_lm(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None,
    recompute: Recompute = "none",
    compiled: bool = False,
) -> PreTrainedModel:
    """The model on a device, which may be `meta`. Without a seed its weights are whatever lies in memory.

    `to_empty` of a model on `meta` loses what is no weight of its own: `restore_rotary_frequencies` comes next, and
    `model.tie_weights()` if embeddings are tied.

    `compiled` hands attention and MLP of each layer to `torch.compile`, each as one graph. Norms stay as they are, and
    so does attention that has norms inside: the noise of the norm layers is measured with hooks on these modules
    (`copus.backends.norm_layers`), which a compiled layer would not run.
    """
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(causal_lm_config(shape), dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    if shape.vocab < shape.padded_vocab:
        model.lm_head.register_forward_hook(functools.partial(_hide_padding, shape.vocab))
    if compiled:
        for layer in model.model.layers:
            for part in (layer.mlp,) if shape.qk_norm != "none" else (layer.self_attn, layer.mlp):
                part.forward = torch.compile(part.forward, fullgraph=True)
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


def _hide_padding(vocab: int, module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> None:
    """Under tensor parallelism each rank has the logits of some tokens."""
    if isinstance(logits, DTensor):
        local = logits.to_local().detach()
        hide_padding(local, vocab, first=logits.device_mesh.get_local_rank() * local.shape[-1])
    else:
        hide_padding(logits, vocab)


def restore_rotary_frequencies(model: PreTrainedModel) -> None:
    """Compute the frequencies of the rotary positions anew: they are buffers that no checkpoint has."""
    rotary = model.model.rotary_emb
    default = rotary.rope_type == "default"
    compute = rotary.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[rotary.rope_type]
    frequencies, _ = compute(model.config)
    rotary.inv_freq.copy_(frequencies)
    rotary.original_inv_freq.copy_(frequencies)


def mean_loss(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross entropy in fp32, nats per token, over all tokens: a label that does not count adds nothing. `model`
    may be wrapped; the tensors are those of a `Microbatch`, int64 of shape (sequences, seq_len) each."""
    options = {}
    if documents is not None:
        # The mask is given even if positions alone begin anew: from these transformers would guess the documents.
        options = {"position_ids": positions, "attention_mask": ~hidden_scores(documents)}
    logits, labels = model(input_ids=tokens, **options).logits, labels.flatten()
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=NOT_COUNTED, reduction="sum")
    return losses / labels.numel()
