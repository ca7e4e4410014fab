"""Multi-head latent attention without Transformer Engine (DeepSeek-V2, 2405.04434, section 2.1)."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional

from copus.backends.megatron import cpu, upstream
from profiles.model_shape import ModelShape

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear  # noqa: E402
from megatron.core.transformer import ModuleSpec, TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.multi_latent_attention import (  # noqa: E402
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)

upstream.use_torch_latent_attention()


def latent_options(model: ModelShape) -> dict[str, Any]:
    """What Megatron's configuration says of latent attention; nothing for a model without it."""
    latent = model.latent_attention
    if latent is None:
        return {}
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": model.head_width - latent.rope_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "rope",  # scaled frequencies are put into it (model.py)
        "rotary_base": model.rope_base,
        "rotary_scaling_factor": 1.0,
    }


def latent_attention_spec(core_attention: type, norm: Any, column: type, linear_proj: type) -> ModuleSpec:
    """Megatron's latent attention; `column` are the projections out of narrow vectors."""
    return ModuleSpec(
        module=_LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "norm": norm},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=column,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=column,
            core_attention=core_attention,
            linear_proj=linear_proj,
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
        ),
    )


class _LatentAttention(MLASelfAttention):
    """Megatron's, but every tensor parallel rank has the down projections whole, as with Transformer Engine.

    Without that Megatron cuts them by rows. The rotated part of the keys then lacks the gradients that other ranks'
    heads have for it (multi_latent_attention.py:581: the backward pass of that gather only splits). The norms that
    follow are put in here as well: 0.19 takes them only with `qk_layernorm`, and then adds up the gradients of the one
    of queries over tensor parallel ranks, which all have the whole (finalize_model_grads.py:353).
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, norm: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.kv_layernorm = norm(config, config.kv_lora_rank, config.layernorm_epsilon)
        if config.q_lora_rank is not None:
            self.q_layernorm = norm(config, config.q_lora_rank, config.layernorm_epsilon)
            self.linear_q_down_proj = _DownProjection(config, config.q_lora_rank, of_every_head=0)
        rotated = config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = _DownProjection(config, config.kv_lora_rank + rotated, of_every_head=rotated)


class _DownProjection(torch.nn.Module):
    """A projection that all tensor parallel ranks make: of their own tokens with sequence parallelism, else of all."""

    def __init__(self, config: TransformerConfig, outputs: int, of_every_head: int) -> None:
        """The last `of_every_head` outputs go into the heads of every rank as they are."""
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(outputs, config.hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        config.init_method(self.weight)
        self._shared = of_every_head
        self._sequence_parallel = config.sequence_parallel

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        output = functional.linear(states, self.weight)
        if self._shared and output.requires_grad and not self._sequence_parallel:
            output.register_hook(self._sum_of_all_heads)  # else Megatron gathers them, and scatters the gradients
        return output, None

    def _sum_of_all_heads(self, gradient: torch.Tensor) -> torch.Tensor:
        """Adds up the gradients that the heads of all ranks have for the shared outputs; the others are whole already.
        Megatron's function for this loses the sum of a tensor that is not contiguous (mappings.py:31)."""
        whole = gradient.clone()
        shared = whole[..., -self._shared :].contiguous()
        dist.all_reduce(shared, group=parallel_state.get_tensor_model_parallel_group())
        whole[..., -self._shared :] = shared
        return whole
