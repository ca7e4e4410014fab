"""The layer of a job's model, as a megatron layer specification.

Without Transformer Engine (`transformer_engine` has the layers with it) three kinds of modules replace megatron's local
ones, through the specification and without touching megatron: the local norm refuses sequence parallel
(torch_norm.py:32), the local attention materialises every score, and no local layer has norms at the outputs of
attention and MLP. None needs Transformer Engine or Apex, so the same model runs on CPU and on any GPU.
"""

from typing import Any, NamedTuple

import torch

from copus.backends.megatron import cpu
from profiles.model_shape import ModelShape

cpu.before_import()
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
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


class NormedOutput:
    """Makes a row-parallel projection into the residual stream one with a norm of what it adds (OLMo 2, Gemma 2)."""

    norm_type: Any
    """Called with the configuration, the width and ε."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)  # type: ignore[call-arg]
        self.post_layernorm = self.norm_type(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """What megatron's does, normed. The bias goes into the norm, so that none is left to add."""
        output, bias = super().forward(input_)  # type: ignore[misc]
        return self.post_layernorm(output if bias is None else output + bias), None


class _RowParallelLinearRMSNorm(NormedOutput, RowParallelLinear):
    norm_type = RMSNorm


class _RowParallelLinearLayerNorm(NormedOutput, RowParallelLinear):
    norm_type = LayerNorm


class LayerModules(NamedTuple):
    """What a layer is made of."""

    norm: Any
    """A norm that stands alone."""
    column: type
    normed_column: type | None
    """The norm before a column-parallel projection and that projection; None if they are two modules."""
    row: type
    normed_row: type
    """A row-parallel projection with a norm of its output."""
    core_attention: type
    experts: ModuleSpec | None
    """The layer of router, experts and shared expert."""


def torch_modules(model: ModelShape, config: TransformerConfig) -> LayerModules:
    """Of torch's kernels: megatron's own layers, own norms and attention."""
    is_layernorm = config.normalization == "LayerNorm"
    return LayerModules(
        norm=LayerNorm if is_layernorm else RMSNorm,
        column=ColumnParallelLinear,
        normed_column=None,
        row=RowParallelLinear,
        normed_row=_RowParallelLinearLayerNorm if is_layernorm else _RowParallelLinearRMSNorm,
        core_attention=ContextParallelAttention if config.context_parallel_size > 1 else CausalAttention,
        experts=expert_spec(model, LocalSpecProvider(), grouped=False) if model.experts else None,
    )


def block_spec(
    model: ModelShape, config: TransformerConfig, modules: LayerModules, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage (and virtual stage), and the norm that follows the last one."""
    is_normed_before = model.norm_position != "post"
    before = modules.norm if is_normed_before else IdentityOp
    is_fused = is_normed_before and modules.normed_column is not None
    normed_column = modules.normed_column if is_fused else modules.column
    of_heads = modules.norm if model.qk_norm == "head" else IdentityOp
    into_residual = modules.row if model.norm_position == "pre" else modules.normed_row
    is_latent = model.latent_attention is not None
    if is_latent:
        attention = latent_attention_spec(modules.core_attention, modules.norm, modules.column, into_residual)
    else:
        attention = ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=normed_column,
                core_attention=modules.core_attention,
                linear_proj=into_residual,
                q_layernorm=of_heads,
                k_layernorm=of_heads,
            ),
        )

    def layer(mlp: ModuleSpec, before_mlp: Any) -> ModuleSpec:
        submodules = TransformerLayerSubmodules(
            input_layernorm=before if is_latent or not is_fused else IdentityOp,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before_mlp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        )
        return ModuleSpec(module=TransformerLayer, submodules=submodules)

    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=normed_column, linear_fc2=into_residual))
    dense = layer(mlp, IdentityOp if is_fused else before)
    with_experts = dense if modules.experts is None else layer(modules.experts, before)
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))
    specs = [dense if number < model.dense_layers else with_experts for number in numbers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=modules.norm)
