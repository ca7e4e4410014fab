"""The layer of a job's model, as a megatron layer specification: own norms and attention, the rest megatron's.

Three kinds of modules replace megatron's local ones, through the specification and without touching megatron: the local
norm refuses sequence parallel (torch_norm.py:32), the local attention materialises every score, and no local layer has
norms at the outputs of attention and MLP. None needs Transformer Engine or Apex, so the same model runs on CPU and on
any GPU.
"""

from typing import Any

import torch

from copus.backends.megatron import cpu
from profiles.model_shape import ModelShape

cpu.before_import()
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
    get_transformer_layer_offset,
)

from copus.backends.megatron.attention import CausalAttention, ContextParallelAttention  # noqa: E402
from copus.backends.megatron.experts import expert_spec  # noqa: E402
from copus.backends.megatron.latent_attention import latent_attention_spec  # noqa: E402


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked for Megatron's all-reduce of gradients over tensor-parallel ranks.

    With sequence parallelism every rank normalises a slice of the sequence, so its gradient of the weight is a partial
    sum.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=_device(config), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    """The same of torch's LayerNorm, which has a bias too."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=_device(config), dtype=config.params_dtype)
        for param in (self.weight, self.bias):
            param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _device(config: TransformerConfig) -> int | None:
    return None if config.use_cpu_initialization else torch.cuda.current_device()


def is_norm_of_heads(name: str, config: TransformerConfig) -> bool:
    """Whether the module or parameter of this name is a norm of the heads of queries or keys.

    Tensor parallel ranks normalise some of the heads each, so its gradients are partial sums whether or not they split
    the sequence too: finalize_model_grads.py:353 adds them up, and goes by the name as well.
    """
    return config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)


class NormedRowParallelLinear(RowParallelLinear):
    """A projection into the residual stream with a norm of what it adds (OLMo 2, Gemma 2)."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = _norm(config)(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """What megatron's does, normed. The bias goes into the norm, so that none is left to add."""
        output, bias = super().forward(input_)
        return self.post_layernorm(output if bias is None else output + bias), None


def _norm(config: TransformerConfig) -> type[RMSNorm] | type[LayerNorm]:
    return LayerNorm if config.normalization == "LayerNorm" else RMSNorm


def block_spec(
    model: ModelShape, config: TransformerConfig, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage (and virtual stage), and the norm that follows the last one."""
    norm = _norm(config)
    before = IdentityOp if model.norm_position == "post" else norm
    of_heads = norm if model.qk_norm == "head" else IdentityOp
    core = ContextParallelAttention if config.context_parallel_size > 1 else CausalAttention
    into_residual = RowParallelLinear if model.norm_position == "pre" else NormedRowParallelLinear
    if model.latent_attention is not None:
        attention = latent_attention_spec(core, norm, into_residual)
    else:
        attention = ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=core,
                linear_proj=into_residual,
                q_layernorm=of_heads,
                k_layernorm=of_heads,
            ),
        )

    def layer(mlp: ModuleSpec) -> ModuleSpec:
        submodules = TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        )
        return ModuleSpec(module=TransformerLayer, submodules=submodules)

    dense = layer(
        ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=into_residual))
    )
    with_experts = layer(expert_spec(model)) if model.experts else dense
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))
    specs = [dense if number < model.dense_layers else with_experts for number in numbers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
