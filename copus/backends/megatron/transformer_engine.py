"""Megatron's layers of Transformer Engine modules: its specification, with weights that say how they are cut.

A norm is fused with the projection behind it, and the experts of a rank are one grouped product. Imported only where
Transformer Engine is installed. Line numbers are those of megatron-core 0.16.1.
"""

from typing import Any

import torch

from copus.backends.megatron import cpu
from copus.backends.megatron.versions import patch
from profiles.model_shape import ModelShape

cpu.before_import()
from megatron.core.extensions import transformer_engine  # noqa: E402
from megatron.core.extensions.transformer_engine import (  # noqa: E402
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from copus.backends.megatron.experts import expert_spec  # noqa: E402
from copus.backends.megatron.modules import LayerModules, NormedOutput, torch_modules  # noqa: E402

_COLUMN = (TELayerNormColumnParallelLinear, TEColumnParallelLinear, TEColumnParallelGroupedLinear)
_ROW = (TERowParallelLinear, TERowParallelGroupedLinear)

_options = transformer_engine._get_extra_te_kwargs


def _on_default_device(config: TransformerConfig) -> dict[str, Any]:
    """Megatron names a device (:343), whatever torch's default is; the shard table is read off a model on meta."""
    options: dict[str, Any] = _options(config)
    return {**options, "device": "meta"} if torch.get_default_device().type == "meta" else options


patch(transformer_engine, "_get_extra_te_kwargs", _on_default_device, oldest=(0, 16), newest=(0, 19))


class _Attention(TEDotProductAttention):
    """With the scale of the job's model; latent attention computes another one (multi_latent_attention.py)."""

    def __init__(self, config: TransformerConfig, *arguments: Any, softmax_scale: float | None = None, **options: Any):
        super().__init__(config, *arguments, softmax_scale=config.softmax_scale or softmax_scale, **options)


class _NormedRowParallelLinear(NormedOutput, TERowParallelLinear):
    norm_type = TENorm


def te_modules(model: ModelShape, config: TransformerConfig, masks_documents: bool) -> LayerModules:
    """What a layer is made of. `masks_documents` is whether tokens attend within their documents only."""
    return LayerModules(
        norm=TENorm,
        column=TEColumnParallelLinear,
        normed_column=TELayerNormColumnParallelLinear,
        row=TERowParallelLinear,
        normed_row=_NormedRowParallelLinear,
        core_attention=_core_attention(model, config, masks_documents),
        experts=expert_spec(model, TESpecProvider(), grouped=True) if model.experts else None,
    )


def _core_attention(model: ModelShape, config: TransformerConfig, masks_documents: bool) -> type:
    """Transformer Engine's attention, a ring with context parallelism. The own one where that lacks something: masks of
    documents, and with context parallelism windows and values of another width than keys. On the meta device too, where
    groups have no ranks; attention has no weights."""
    is_ring = config.context_parallel_size > 1
    lacks = masks_documents or (is_ring and (model.sliding_window or model.latent_attention is not None))
    if lacks or torch.get_default_device().type == "meta":
        return torch_modules(model, config).core_attention
    return _Attention


def mark_cuts(chunk: torch.nn.Module, config: TransformerConfig) -> None:
    """Write on every weight along which axis tensor parallel ranks cut it, and in how many blocks.

    Transformer Engine does so itself for some: not on the meta device, and an expert's row-parallel weight says that it
    is cut by rows, since Megatron cuts it before (:600) and sends the tokens.
    """
    for name, module in chunk.named_modules():
        if not isinstance(module, _COLUMN + _ROW):
            continue
        is_row = isinstance(module, _ROW)
        blocks = 2 if config.gated_linear_unit and name.endswith("linear_fc1") else 1
        for kind, param in module.named_parameters(recurse=False):
            is_cut = kind.startswith("weight") or (kind.startswith("bias") and not is_row)
            if is_cut:
                param.tensor_model_parallel = True
                param.partition_dim = int(is_row)
                param.partition_stride = blocks
