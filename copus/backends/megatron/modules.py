"""The Llama-style layer, as a megatron layer specification: its own RMSNorm and attention, megatron's everything else.

Two modules replace megatron's local ones, through the specification and without touching megatron:
the local norm refuses sequence parallel (torch_norm.py:32), and the local attention materialises every score.
Neither needs Transformer Engine or Apex, so the same model runs on CPU and on any GPU.
"""

import math
from typing import Any

import torch
import torch.nn.functional as functional

from copus.backends.megatron import cpu

cpu.before_import()
from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer import ModuleSpec, TransformerConfig  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked for Megatron's all-reduce of gradients over tensor-parallel ranks.

    With sequence parallelism every rank normalises a slice of the sequence, so its gradient of the weight is a partial
    sum.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(torch.nn.Module):
    """torch's fused causal attention over the heads of this tensor parallel rank.

    `query` is [s, b, heads/tp, head width]; `key` and `value` are [s, b, kv_heads/tp, head width]; the result is
    [s, b, hidden/tp].
    """

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.scale = 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **_: Any,
    ) -> torch.Tensor:
        sequence, batch, heads, width = query.shape
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "dropout_p": dropout,
            "is_causal": True,
            "scale": self.scale,
            "enable_gqa": key.shape[1] != heads,
        }
        if dropout:  # two tensor-parallel ranks must not drop the same scores
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = functional.scaled_dot_product_attention(query, key, value, **options)
        else:
            context = functional.scaled_dot_product_attention(query, key, value, **options)
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * width)


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage (and virtual stage), and the norm that follows the last one."""
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CausalAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
