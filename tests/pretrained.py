"""Tiny random models of each family, made and saved by transformers itself."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SEQ_LEN = 16
VOCAB = 130
"""No multiple of 128: the state of a job pads it."""
_USUAL = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5, "head_dim": 16},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
    "arcee": {},
    "gemma": {"head_dim": 16},
    "phi3": {},
    "starcoder2": {"sliding_window": None},
    "nemotron": {"num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
        **{"head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []},
    },
    "deepseek_v3": {
        **{"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8},
        **{"qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "n_shared_experts": 1},
        **{"moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
        "first_k_dense_replace": 1,
        "rope_parameters": {
            **{"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    },
    "gemma2": {
        **{"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24},
        **{"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "gemma3_text": {"head_dim": 16, "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 16},
    "olmo3": {"layer_types": ["full_attention"] * 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": SEQ_LEN, "n_inner": 48},
}
ON_MEGATRON = [family for family in FAMILIES if family not in ("olmo2", "olmo3")]
WITH_TRANSFORMERS = ["llama", "qwen2", "qwen3", "olmo2", "olmo3", "arcee"]
"""What the backends train that build transformers' own models."""


def tiny_config(family: str, **settings: Any) -> Any:
    """Its configuration, as transformers has it."""
    values = {**_USUAL, **FAMILIES.get(family, {}), **settings}
    if family == "gpt2":
        values = {name: value for name, value in values.items() if name not in _USUAL or name.endswith("token_id")}
        values["vocab_size"] = VOCAB
    return AutoConfig.for_model(family, **copy.deepcopy(values))


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Save a random model in which every weight matters: large ones, norms and biases too. Returns its folder."""
    config = tiny_config(family, **settings)
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = weight.ndim == 1 and "bias" not in name
            weight.copy_(torch.randn(weight.shape) * (0.2 if weight.ndim == 1 else 0.3) + float(is_norm) * 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape) * 0.3)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def open_folder(folder: Path) -> Any:
    """The model in a folder as transformers opens it, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(count: int = 4) -> torch.Tensor:
    """Token ids of shape (count, SEQ_LEN)."""
    return torch.randint(VOCAB, (count, SEQ_LEN), generator=torch.Generator().manual_seed(5))
