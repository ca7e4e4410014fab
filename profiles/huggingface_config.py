"""A Hugging Face configuration (`config.json`) as fields of the `model` section, read as plain JSON.

Nothing is ignored that makes another model: a key that is neither read nor known to say nothing of the decoder is
refused, as is every choice that the section has no field for. How weights are stored, where text begins and ends, how
tokens are generated, and dropout (`training.dropout`) are no part of the model.
"""

import difflib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

Fields = dict[str, Any]

LONGEST_BYTES = 2**20
"""Of a configuration."""

_NOT_OF_THE_MODEL = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version name_or_path _name_or_path model_type _commit_hash
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id image_token_index
    tokenizer_class vocab_file use_cache cache_implementation is_decoder is_encoder_decoder add_cross_attention
    tie_encoder_decoder output_attentions output_hidden_states output_router_logits return_dict return_dict_in_generate
    gradient_checkpointing keys_to_ignore_at_inference chunk_size_feed_forward id2label label2id num_labels
    problem_type torchscript task_specific_params use_bfloat16 attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal quantization_config initializer_range
    initializer_factor pretraining_tp attention_dropout hidden_dropout embedding_dropout residual_dropout resid_pdrop
    embd_pdrop attn_pdrop classifier_dropout router_aux_loss_coef router_jitter_noise n_ctx
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    reorder_and_upcast_attn prefix finetuning_task pruned_heads max_length min_length
    rope_scaling rope_parameters rope_theta max_position_embeddings
    """.split()  # noqa: SIM905 (a list of words reads better as words)
)
"""Keys that say nothing of the decoder, and those of rotary positions, which `_rope` reads."""

_ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu", "relu2": "squared_relu"},
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
}


class _Config:
    """A configuration that remembers which of its keys were read."""

    def __init__(self, values: Fields) -> None:
        self._values = dict(values)
        self._read = set(_NOT_OF_THE_MODEL)

    def take(self, name: str, *default: Any) -> Any:
        """A value; null counts as the default. Raises ValueError if it is missing and there is no default."""
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default:
            return default[0]
        raise ValueError(f"{name} is missing")

    def default(self, name: str, value: Any) -> None:
        """What the family has if the key is missing."""
        self._values.setdefault(name, value)

    def replace(self, name: str, value: Any) -> None:
        """Another value for a key that was read."""
        self._values[name] = value

    def window(self, missing: int | None) -> int | None:
        """`sliding_window`: of the family, `missing`, unless it is there; null is none."""
        self._read.add("sliding_window")
        value: int | None = self._values.get("sliding_window", missing)
        return value

    def expect(self, name: str, *usual: Any) -> None:
        """Raise ValueError if a value is there and none of the usual ones, which are what the section can say."""
        value = self.take(name, None)
        if value is not None and value not in usual:
            raise ValueError(f"{name}({_short(value)}): the model section has no field for it")

    def check_all_read(self) -> None:
        """Raise ValueError for a key that nothing has read, unless it is off."""
        for name, value in self._values.items():
            if name not in self._read and value not in (None, False, 0, [], {}):
                raise ValueError(f"{name}({_short(value)}) is not understood")


def read_config(path: Path) -> Fields:
    """Fields of the model section from a `config.json`, or from the folder that it lies in; `seq_len` is not among them
    unless positions are learned.

    Raises ValueError, in one line, for a file that cannot be read and for a model that the section cannot express.
    """
    file = path / "config.json" if path.is_dir() else path
    values = read_values(file)
    try:
        return config_fields(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_values(file: Path) -> Fields:
    """The values of a `config.json`. Raises ValueError, in one line, if it cannot be read or names no `model_type`."""
    try:
        if file.is_file() and file.stat().st_size > LONGEST_BYTES:
            raise ValueError(f"{file}: {file.stat().st_size} bytes; a configuration has at most {LONGEST_BYTES}")
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(f"{file}: no Hugging Face configuration: it names no model_type")
    return values


def config_fields(values: Fields) -> Fields:
    """The same from the values of a configuration."""
    kind = values["model_type"]
    if kind in _MISSING:
        raise ValueError(f"model_type({kind}): the model section has no fields for {_MISSING[kind]}")
    if kind not in _FAMILIES:
        near = difflib.get_close_matches(kind, _FAMILIES, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(_FAMILIES)}"
        raise ValueError(f"model_type({kind}) is unknown: {hint}")
    config = _Config(values)
    try:
        fields = _FAMILIES[kind](config)
    except TypeError as error:  # a text where a number belongs
        raise ValueError(f"a value is of the wrong kind: {error}") from None
    config.check_all_read()
    return {name: value for name, value in fields.items() if value is not None}


def _decoder(config: _Config, *, tied: bool = False, epsilon: str = "rms_norm_eps", act: str = "hidden_act") -> Fields:
    """What nearly all families have, under the same names. `tied` is the family's default."""
    activation = config.take(act)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{act}({_short(activation)}): the model section has {', '.join(_ACTIVATIONS)}")
    return {
        "layers": config.take("num_hidden_layers"),
        "hidden": config.take("hidden_size"),
        "ffn_hidden": config.take("intermediate_size"),
        "heads": config.take("num_attention_heads"),
        "kv_heads": config.take("num_key_value_heads", config.take("num_attention_heads")),
        "head_dim": config.take("head_dim", None),
        "vocab": config.take("vocab_size"),
        "tied_embeddings": config.take("tie_word_embeddings", tied),
        "norm_epsilon": config.take(epsilon),
        "activation": _ACTIVATIONS[activation],
        **_rope(config),
    }


def _rope(config: _Config) -> Fields:
    """Rotary positions: `rope_parameters` of new configurations, `rope_theta` and `rope_scaling` of older ones."""
    rope = config.take("rope_parameters", None) or {
        "rope_theta": config.take("rope_theta", None),
        **config.take("rope_scaling", {}),
    }
    local_base = config.take("rope_local_base_freq", None)
    if "full_attention" in rope:  # by kind of layer
        local = rope.get("sliding_attention", {})
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters: scaling({local['rope_type']}) of layers with a window has no field")
        local_base, rope = local.get("rope_theta"), rope["full_attention"]
    fraction = rope.get("partial_rotary_factor", config.take("partial_rotary_factor", 1.0))
    return {
        "rope_base": float(rope.get("rope_theta") or _usual_base(config)),
        "rope_fraction": float(fraction),
        "rope_scaling": _scaling(config, rope),
        "rope_local_base": local_base,
    }


def _usual_base(config: _Config) -> float:
    """For the families whose first configurations do not name it."""
    if config.take("model_type") in ("llama", "mistral", "gemma", "gemma2", "phi3"):
        return 10000.0
    raise ValueError("rope_theta is missing")


def _scaling(config: _Config, rope: Fields) -> Fields | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    names = {
        "linear": (),
        "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    if kind not in names:
        raise ValueError(f"rope_scaling: type({_short(kind)}) has no field: rope_scaling.kind is {', '.join(names)}")
    values = {name: rope.get(name) for name in ("factor", *names[kind])}
    usual = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    for name, value in rope.items():
        if name not in values and name not in usual and value is not None:
            raise ValueError(f"rope_scaling: {name}({_short(value)}) has no field")
    original = values.pop("original_max_position_embeddings", None)
    if kind != "linear":
        original = original or config.take("original_max_position_embeddings", None)
        values["original_seq_len"] = original or config.take("max_position_embeddings")
    return {"kind": kind, **{name: value for name, value in values.items() if value is not None}}


def _windows(config: _Config, window: int | None, every: int = 0) -> Fields:
    """Sliding windows. `every` is the family's pattern, for configurations that do not list the kinds of layers."""
    kinds = config.take("layer_types", None)
    every = config.take("sliding_window_pattern", config.take("_sliding_window_pattern", every))
    if kinds is not None:
        full = [number for number, kind in enumerate(kinds, start=1) if kind == "full_attention"]
        every = full[0] if full else 0
        if kinds != [_kind(number, every) for number in range(1, len(kinds) + 1)]:
            raise ValueError(f"layer_types({_short(kinds)}): full_attention_every says every n-th layer only")
    if window is None or every == 1:
        return {}
    return {"sliding_window": window, "full_attention_every": every}


def _kind(number: int, every: int) -> str:
    return "full_attention" if every and number % every == 0 else "sliding_attention"


def _attention_bias(config: _Config) -> Fields:
    """Biases of the four projections of attention, and of the MLP."""
    attention, mlp = config.take("attention_bias", False), config.take("mlp_bias", False)
    if mlp and not attention:
        raise ValueError("mlp_bias(true) without attention_bias: bias has none, qkv, attention and all")
    return {"bias": "all" if mlp else "attention" if attention else "none"}


def _llama(config: _Config) -> Fields:
    return _decoder(config) | _attention_bias(config)


def _arcee(config: _Config) -> Fields:
    return _decoder(config) | _attention_bias(config) | {"gated_mlp": False}


def _mistral(config: _Config) -> Fields:
    return _decoder(config) | _windows(config, config.window(4096))


def _mixtral(config: _Config) -> Fields:
    experts = {"experts": config.take("num_local_experts"), "experts_per_token": config.take("num_experts_per_tok")}
    return _decoder(config) | _windows(config, config.window(None)) | experts


def _qwen_windows(config: _Config) -> Fields:
    """Off unless `use_sliding_window` says so; then the first `max_window_layers` attend to everything."""
    window, first = config.window(None), config.take("max_window_layers", 28)
    if not config.take("use_sliding_window", False):
        config.take("layer_types", None)
        return {}
    if first:
        raise ValueError(f"max_window_layers({first}): full_attention_every says every n-th layer only")
    return _windows(config, window)


def _qwen2(config: _Config) -> Fields:
    return _decoder(config) | _qwen_windows(config) | {"bias": "qkv"}


def _qwen3(config: _Config) -> Fields:
    config.default("head_dim", 128)
    return _decoder(config) | {"qk_norm": "head"} | _attention_bias(config) | _qwen_windows(config)


def _qwen3_moe(config: _Config) -> Fields:
    config.expect("decoder_sparse_step", 1)
    config.expect("mlp_only_layers", [])
    config.default("head_dim", None)  # hidden ÷ heads, unlike the dense models of the family
    config.take("intermediate_size", None)  # of dense layers, of which there are none
    experts = {
        "ffn_hidden": config.take("moe_intermediate_size"),
        "experts": config.take("num_experts", config.take("num_local_experts", None)),
        "experts_per_token": config.take("num_experts_per_tok"),
        "router": {"normalized": config.take("norm_topk_prob", False)},
    }
    return _qwen3(config) | experts


def _deepseek_v3(config: _Config) -> Fields:
    for name, usual in (
        *(
            ("rope_interleave", True),
            ("topk_method", "noaux_tc"),
            ("scoring_func", "sigmoid"),
            ("norm_topk_prob", True),
        ),
        *(("moe_layer_freq", 1), ("attention_bias", False)),
    ):
        config.expect(name, usual)
    # How experts are spread over ranks; the coefficient of a loss; modules beside the model that predict more tokens.
    for name in ("ep_size", "seq_aux", "aux_loss_alpha", "num_nextn_predict_layers"):
        config.take(name, None)
    config.default("head_dim", None)
    width, rope_dim = config.take("moe_intermediate_size"), config.take("qk_rope_head_dim")
    head_dim = config.take("qk_nope_head_dim") + rope_dim
    config.take("qk_head_dim", None)
    groups, of_token = config.take("n_group", 1), config.take("topk_group", 1)
    if groups > 1 and config.take("num_experts_per_tok") != 2 * of_token:
        raise ValueError(f"topk_group({of_token}): the two best scores of a group count, and the section has no field")
    scale = _split_scale_off(config)
    return {
        **_decoder(config),
        "head_dim": head_dim,
        "attention_scale": None if scale == 1 else scale * head_dim**-0.5,
        "latent_attention": {
            "query_rank": config.take("q_lora_rank", None),
            "kv_rank": config.take("kv_lora_rank"),
            "rope_dim": rope_dim,
            "value_dim": config.take("v_head_dim"),
        },
        "dense_layers": config.take("first_k_dense_replace"),
        "experts": config.take("n_routed_experts"),
        "experts_per_token": config.take("num_experts_per_tok"),
        "expert_hidden": width,
        "shared_expert_hidden": width * config.take("n_shared_experts", 0),
        "router": {
            **{"scores": "sigmoid", "scale": config.take("routed_scaling_factor"), "bias_update_rate": 0.001},
            **{"groups": groups, "groups_per_token": of_token, "aux_loss": 0.0001},  # not in it: those of the paper
        },
    }


def _split_scale_off(config: _Config) -> float:
    """DeepSeek's YaRN multiplies scores by the square of 0.1 · mscale_all_dim · ln(factor) + 1, and sines and cosines
    by the same with mscale over that. Returns the former; the latter becomes the scaling's `attention_factor`."""
    name = "rope_parameters" if config.take("rope_parameters", None) else "rope_scaling"
    rope = dict(config.take(name, {}))
    of_rotation, of_all = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if "factor" not in rope or not of_all:
        return 1.0

    def scale(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0

    if of_rotation:
        rope.setdefault("attention_factor", scale(of_rotation) / scale(of_all))
    config.replace(name, rope)
    return scale(of_all) ** 2


def _olmo2(config: _Config) -> Fields:
    return _decoder(config) | _attention_bias(config) | {"norm_position": "post", "qk_norm": "projection"}


def _olmo3(config: _Config) -> Fields:
    fields = _olmo2(config) | _windows(config, config.window(4096), every=4)
    # Frequencies are scaled only in the layers that attend to everything.
    is_scaled_by_layer = fields["rope_scaling"] is not None and "sliding_window" in fields
    return fields | {"rope_local_base": fields["rope_base"] if is_scaled_by_layer else None}


def _gemma(config: _Config) -> Fields:
    config.take("hidden_activation", None)  # the name of `hidden_act` in some of its versions
    config.take("hidden_act", None)
    config.default("head_dim", 256)
    fields = _decoder(config, tied=True) | _attention_bias(config)
    return fields | {"activation": "gelu_tanh", "embedding_scale": math.sqrt(fields["hidden"])}


def _gemma2(config: _Config, every: int = 2) -> Fields:
    config.expect("use_bidirectional_attention", False)
    fields = _decoder(config, tied=True, act="hidden_activation") | _attention_bias(config)
    config.take("hidden_act", None)  # not read by transformers either
    scalar = config.take("query_pre_attn_scalar", 256)
    width = fields["head_dim"] or 256
    return {
        **fields,
        **_windows(config, config.window(4096), every),
        "head_dim": width,
        "norm_position": "both",
        "embedding_scale": math.sqrt(fields["hidden"]),
        "attention_scale": None if scalar == width else scalar**-0.5,
        "attention_softcap": config.take("attn_logit_softcapping", None),
        "logit_softcap": config.take("final_logit_softcapping", None),
    }


def _gemma3(config: _Config) -> Fields:
    fields = _gemma2(config, every=6) | {"qk_norm": "head"}
    local = fields["rope_local_base"] or 10000.0
    return fields | {"rope_local_base": local if "sliding_window" in fields else None}


def _phi3(config: _Config) -> Fields:
    config.take("original_max_position_embeddings", None)
    return _decoder(config) | _windows(config, config.window(None))


def _starcoder2(config: _Config) -> Fields:
    config.expect("norm_type", "layer_norm")
    config.expect("mlp_type", "default")
    fields = _decoder(config, tied=True, epsilon="norm_epsilon")
    bias = "all" if config.take("use_bias", True) else "none"
    return {
        **fields,
        **_windows(config, config.window(None)),
        **{"norm": "layernorm", "gated_mlp": False, "bias": bias},
    }


def _nemotron(config: _Config) -> Fields:
    config.default("partial_rotary_factor", 0.5)
    fields = _decoder(config, epsilon="norm_eps") | _attention_bias(config)
    return fields | {"norm": "layernorm", "gated_mlp": False}


def _gpt2(config: _Config) -> Fields:
    config.expect("scale_attn_weights", True)
    config.expect("scale_attn_by_inverse_layer_idx", False)
    heads, hidden = config.take("n_head"), config.take("n_embd")
    activation = config.take("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation_function({_short(activation)}): the section has {', '.join(_ACTIVATIONS)}")
    return {
        **{"layers": config.take("n_layer"), "hidden": hidden, "ffn_hidden": config.take("n_inner", 4 * hidden)},
        **{"heads": heads, "kv_heads": heads, "vocab": config.take("vocab_size")},
        **{"seq_len": config.take("n_positions"), "positions": "learned", "norm": "layernorm", "bias": "all"},
        "norm_epsilon": config.take("layer_norm_epsilon", 1e-5),
        "tied_embeddings": config.take("tie_word_embeddings", True),
        **{"gated_mlp": False, "activation": _ACTIVATIONS[activation]},
    }


_FAMILIES: dict[str, Callable[[_Config], Fields]] = {
    **{"llama": _llama, "arcee": _arcee, "mistral": _mistral, "ministral": _mistral, "mixtral": _mixtral},
    **{"qwen2": _qwen2, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "olmo2": _olmo2, "olmo3": _olmo3},
    **{"gemma": _gemma, "gemma2": _gemma2, "gemma3_text": _gemma3, "phi3": _phi3},
    "deepseek_v3": _deepseek_v3,
    **{"starcoder2": _starcoder2, "nemotron": _nemotron, "gpt2": _gpt2},
}
_MISSING = {
    "olmo": "norms without weights, and clipped queries, keys and values",
    "phi": "attention and MLP in parallel",
    "gpt_neox": "attention and MLP in parallel",
    "falcon": "attention and MLP in parallel",
    "gemma3": "its vision tower; the decoder is in text_config, which may stand in a file of its own",
    "deepseek_v2": "the choice of groups by their one best expert",
    "gpt_oss": "attention sinks and the clamped SwiGLU of its experts",
    "qwen2_moe": "the gate of its shared expert",
    "granite": "scales of the residual branches and of the logits",
    "smollm3": "layers without positions",
}
"""Families that are known to have something which the section cannot say."""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
