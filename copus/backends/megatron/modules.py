"""The layer of a job's model, as a megatron layer specification: own norms and attention, the rest megatron's.

Three kinds of modules replace megatron's local ones, through the specification and without touching megatron: the local
norm refuses sequence parallel (torch_norm.py:32), the local attention materialises every score, and no local layer has
norms at the outputs of attention and MLP. None needs Transformer Engine or Apex, so the same model runs on CPU and on
any GPU.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as functional

from copus.backends.megatron import cpu
from profiles.model_shape import ModelShape

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
    get_transformer_layer_offset,
)

from copus.backends.megatron.experts import expert_spec  # noqa: E402


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


def is_norm_of_heads(name: str) -> bool:
    """Whether the module or parameter of this name is a norm of queries or keys.

    Tensor parallel ranks normalise some of the heads each, so its gradients are partial sums whether or not they split
    the sequence too: finalize_model_grads.py:353 adds them up, and goes by the name as well.
    """
    return "q_layernorm" in name or "k_layernorm" in name


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


class CausalAttention(torch.nn.Module):
    """torch's fused causal attention over the heads of this tensor parallel rank, to all tokens before or to the window
    of the layer, or to what `attention_mask` leaves.

    `query` is [s, b, heads/tp, head width]; `key` and `value` are [s, b, kv_heads/tp, head width]; the result is
    [s, b, heads · head width / tp].
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        every = config.window_attn_skip_freq
        all_tokens = config.window_size is None or (every and layer_number % every == 0)
        self.window = None if all_tokens else config.window_size[0] + 1
        """Tokens that a token attends to, itself included."""

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
        options: dict[str, Any] = {"dropout_p": dropout, "scale": self.scale, "enable_gqa": key.shape[1] != heads}
        within_window = self.window is not None and self.window < sequence
        if attention_mask is not None:  # True for what is hidden, later tokens included
            mask = ~attention_mask
            if within_window:
                mask = mask & (_window_mask(sequence, self.window, query.dtype, query.device) == 0)
            options["attn_mask"] = mask
        elif not within_window:
            options["is_causal"] = True
        else:
            options["attn_mask"] = _window_mask(sequence, self.window, query.dtype, query.device)
        if dropout:  # two tensor-parallel ranks must not drop the same scores
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = functional.scaled_dot_product_attention(query, key, value, **options)
        else:
            context = functional.scaled_dot_product_attention(query, key, value, **options)
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * width)


@functools.lru_cache(maxsize=2)
def _window_mask(sequence: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What is added to the scores of each token (row): 0 for itself and the `window` − 1 before it, else −∞.

    One for all layers; of a mask of truth values each layer would keep a copy in `dtype`.
    """
    position = torch.arange(sequence, device=device)
    distance = position[:, None] - position[None, :]
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(sequence, sequence, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)


def block_spec(
    model: ModelShape, config: TransformerConfig, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage (and virtual stage), and the norm that follows the last one."""
    norm = _norm(config)
    before = IdentityOp if model.norm_position == "post" else norm
    of_heads = norm if model.qk_norm == "head" else IdentityOp
    into_residual = RowParallelLinear if model.norm_position == "pre" else NormedRowParallelLinear

    def layer(mlp: ModuleSpec) -> ModuleSpec:
        submodules = TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CausalAttention,
                    linear_proj=into_residual,
                    q_layernorm=of_heads,
                    k_layernorm=of_heads,
                ),
            ),
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
