"""A `model` section as the values of a Hugging Face configuration: the way back from `huggingface_config`.

A family is taken only if its configuration, read again, is the same model. So nothing of a model can be lost, but for
how tokens are spread over experts in training.
"""

import math
from collections.abc import Callable

from pydantic import ValidationError

from profiles.huggingface_config import Fields, config_fields
from profiles.model_shape import ModelShape

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "squared_relu": "relu2"}


def config_values(shape: ModelShape, prefer: str | None = None) -> Fields:
    """The values of a `config.json` for a model: of the family `prefer` (a `model_type`) if that has it, else of the
    first that does. Token ids and the type of the weights are left to the caller.

    Raises ValueError if no family has the model.
    """
    families = sorted(_FAMILIES, key=lambda family: family != prefer)
    for family in families:
        architecture, make = _FAMILIES[family]
        values = {"architectures": [architecture], "model_type": family, **make(shape)}
        values = {name: value for name, value in values.items() if value is not None}
        if is_model_of(values, shape):
            return values
    raise ValueError(f"no family of Hugging Face has this model; there are {', '.join(_FAMILIES)}")


def is_model_of(values: Fields, shape: ModelShape) -> bool:
    """Whether a configuration is that of the model. Scales may differ beyond the seventh digit: families compute them,
    and the model section has them written out."""
    try:
        read = ModelShape(**{"seq_len": shape.seq_len, **config_fields(values)})
    except (ValueError, ValidationError, TypeError):
        return False
    asked = shape.without_training
    pairs = ((value, getattr(asked, name)) for name, value in read.without_training)
    return all(
        math.isclose(one, other, rel_tol=1e-7) if isinstance(one, float) and isinstance(other, float) else one == other
        for one, other in pairs
    )


def _decoder(shape: ModelShape, epsilon: str = "rms_norm_eps", act: str = "hidden_act") -> Fields:
    """What nearly all families have, in the names that every version of transformers reads."""
    scaling = shape.rope_scaling
    longest = max(shape.seq_len, scaling.original_seq_len or 0 if scaling else 0)
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn_hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        act: _ACTIVATIONS[shape.mlp_activation],
        epsilon: shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_embeddings,
        "max_position_embeddings": longest,
        "rope_theta": shape.rope_base,
        "rope_scaling": _rope_scaling(shape),
        "partial_rotary_factor": None if shape.rope_fraction == 1 else shape.rope_fraction,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _rope_scaling(shape: ModelShape) -> Fields | None:
    scaling = shape.rope_scaling
    if scaling is None:
        return None
    values: Fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            values["attention_factor"] = scaling.attention_factor
    return values


def _biases(shape: ModelShape) -> Fields:
    return {"attention_bias": shape.bias in ("attention", "all"), "mlp_bias": shape.bias == "all"}


def _windows(shape: ModelShape) -> Fields:
    every = shape.full_attention_every
    kinds = ["full_attention" if every and number % every == 0 else "sliding_attention" for number in _layers(shape)]
    return {"sliding_window": shape.sliding_window, "layer_types": kinds if shape.sliding_window else None}


def _layers(shape: ModelShape) -> range:
    return range(1, shape.layers + 1)


def _llama(shape: ModelShape) -> Fields:
    return _decoder(shape) | _biases(shape)


def _mistral(shape: ModelShape) -> Fields:
    return _decoder(shape) | {"sliding_window": shape.sliding_window}


def _mixtral(shape: ModelShape) -> Fields:
    return _mistral(shape) | {"num_local_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}


def _qwen2(shape: ModelShape) -> Fields:
    windows = {"use_sliding_window": True, "max_window_layers": 0, **_windows(shape)} if shape.sliding_window else {}
    return _decoder(shape) | windows


def _qwen3(shape: ModelShape) -> Fields:
    return _qwen2(shape) | {"attention_bias": shape.bias == "attention"}


def _qwen3_moe(shape: ModelShape) -> Fields:
    experts = {"num_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
    return (
        _qwen3(shape) | experts | {"moe_intermediate_size": shape.ffn_hidden, "norm_topk_prob": shape.router.normalized}
    )


def _deepseek_v3(shape: ModelShape) -> Fields:
    latent, scaling, router = shape.latent_attention, _rope_scaling(shape), shape.router
    if latent is None:
        return {}
    if scaling and scaling["factor"] > 1 and shape.attention_scale:
        # (0.1 · mscale_all_dim · ln(factor) + 1)² / √head_dim
        root = math.sqrt(shape.attention_scale * math.sqrt(shape.head_width))
        scaling["mscale_all_dim"] = (root - 1) / (0.1 * math.log(scaling["factor"]))
    return {
        **_decoder(shape),
        **{"rope_scaling": scaling, "rope_interleave": True, "head_dim": latent.rope_dim, "attention_bias": False},
        **{"q_lora_rank": latent.query_rank, "kv_lora_rank": latent.kv_rank, "v_head_dim": latent.value_dim},
        **{"qk_rope_head_dim": latent.rope_dim, "qk_nope_head_dim": shape.head_width - latent.rope_dim},
        **{"n_routed_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token},
        **{"moe_intermediate_size": shape.expert_width, "first_k_dense_replace": shape.dense_layers},
        "n_shared_experts": shape.shared_expert_hidden // shape.expert_width,
        **{"n_group": router.groups, "topk_group": router.groups_per_token},
        **{"routed_scaling_factor": router.scale, "norm_topk_prob": router.normalized},
    }


def _olmo2(shape: ModelShape) -> Fields:
    return _decoder(shape) | {"attention_bias": shape.bias == "attention"}


def _olmo3(shape: ModelShape) -> Fields:
    return _olmo2(shape) | _windows(shape)


def _gemma(shape: ModelShape) -> Fields:
    values = _decoder(shape) | {"attention_bias": shape.bias == "attention"}
    return values | {"hidden_activation": values["hidden_act"]}


def _gemma2(shape: ModelShape) -> Fields:
    scale = shape.attention_scale
    return {
        **_decoder(shape, act="hidden_activation"),
        **_windows(shape),
        "attention_bias": shape.bias == "attention",
        "query_pre_attn_scalar": round(scale**-2) if scale else shape.head_width,
        "attn_logit_softcapping": shape.attention_softcap,
        "final_logit_softcapping": shape.logit_softcap,
    }


def _gemma3(shape: ModelShape) -> Fields:
    return _gemma2(shape) | {"rope_local_base_freq": shape.rope_local_base}


def _phi3(shape: ModelShape) -> Fields:
    return _decoder(shape) | {"sliding_window": shape.sliding_window}


def _starcoder2(shape: ModelShape) -> Fields:
    values = _decoder(shape, epsilon="norm_epsilon") | {"sliding_window": shape.sliding_window}
    return values | {"use_bias": shape.bias == "all", "norm_type": "layer_norm", "mlp_type": "default"}


def _nemotron(shape: ModelShape) -> Fields:
    return _decoder(shape, epsilon="norm_eps") | _biases(shape) | {"partial_rotary_factor": shape.rope_fraction}


def _gpt2(shape: ModelShape) -> Fields:
    activation = _ACTIVATIONS[shape.mlp_activation]
    return {
        **{"n_layer": shape.layers, "n_embd": shape.hidden, "n_inner": shape.ffn_hidden, "n_head": shape.heads},
        **{"vocab_size": shape.vocab, "n_positions": shape.seq_len, "layer_norm_epsilon": shape.norm_epsilon},
        "activation_function": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
        "tie_word_embeddings": shape.tied_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **{"initializer_range": 0.02, "use_cache": True},
    }


_FAMILIES: dict[str, tuple[str, Callable[[ModelShape], Fields]]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "olmo2": ("Olmo2ForCausalLM", _olmo2),
    "mistral": ("MistralForCausalLM", _mistral),
    "arcee": ("ArceeForCausalLM", _llama),
    "mixtral": ("MixtralForCausalLM", _mixtral),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _deepseek_v3),
    "olmo3": ("Olmo3ForCausalLM", _olmo3),
    "gemma": ("GemmaForCausalLM", _gemma),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3_text": ("Gemma3ForCausalLM", _gemma3),
    "phi3": ("Phi3ForCausalLM", _phi3),
    "starcoder2": ("Starcoder2ForCausalLM", _starcoder2),
    "nemotron": ("NemotronForCausalLM", _nemotron),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
}
"""The class of transformers and the configuration of a family, in the order in which they are tried."""
