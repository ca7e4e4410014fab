"""Builds the Megatron GPT of a job in a layout, with weights that depend on the seed alone and not on the layout."""

import hashlib
from typing import Any

import torch
import torch.nn.functional as functional

from copus.backends.megatron import cpu
from profiles.layout import Layout
from profiles.model_shape import ModelShape

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from copus.backends.megatron.modules import block_spec  # noqa: E402
from copus.backends.megatron.sharded import model_tensors  # noqa: E402

_INIT_STD = 0.02


def transformer_config(shape: ModelShape, layout: Layout, precision: str, dropout: float) -> TransformerConfig:
    """Megatron's configuration of the model. Every fusion that needs Transformer Engine or Apex is off."""
    on_cpu = not torch.cuda.is_available()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    recompute = {"none": None, "selective": "selective", "full": "full"}[layout.recompute]
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn_hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=shape.gated_mlp,
        activation_func=functional.silu if shape.gated_mlp else functional.gelu,
        add_bias_linear=False,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        use_cpu_initialization=on_cpu,
        # `initialize` below fills the weights; perform_initialization itself must stay on, since it also marks what is
        # tensor parallel
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # Batched and overlapped point-to-point silently give wrong gradients with virtual stages on gloo (PP2·VP2).
        batch_p2p_comm=not on_cpu and layout.vp == 1,
        overlap_p2p_comm=False,
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def build_model(
    shape: ModelShape, layout: Layout, config: TransformerConfig, seed: int | None, overlap_grad_reduce: bool
) -> list[DistributedDataParallel]:
    """The model chunks of this rank (one, or `vp`), wrapped in megatron's data parallelism.

    Process groups of the layout must exist. Without a seed the weights are left as they come, for somebody else to
    fill.
    """
    chunks: list[Any] = []
    for stage in range(layout.vp):
        vp_stage = stage if layout.vp > 1 else None
        chunk: Any = GPTModel(
            config,
            block_spec(config, vp_stage),
            shape.padded_vocab,
            shape.seq_len,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_base,
            vp_stage=vp_stage,
        )
        if torch.cuda.is_available():
            chunk = chunk.cuda()
        if seed is not None:
            initialize(chunk, shape.layers, seed)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)

    reduce = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.zero > 0,
        overlap_grad_reduce=overlap_grad_reduce,
        check_for_nan_in_grad=False,  # the step itself looks at the norm, and skips
    )
    wrapped = [
        DistributedDataParallel(config, reduce, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if overlap_grad_reduce:  # only the last micro-batch's gradients may set a reduction off
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


@torch.no_grad()
def initialize(chunk: torch.nn.Module, layers: int, seed: int) -> None:
    """Fill the weights: a function of the seed and of each tensor's name, the same numbers on every layout.

    Every layer's whole tensor is drawn, and the part that this rank holds is kept. Standard deviation 0.02; the
    projections that write to the residual stream have 0.02 / √(2·layers) (GPT-2); norms start at 1.
    """
    for tensor in model_tensors(chunk):
        if "norm" in tensor.key:
            tensor.data.fill_(1.0)
            continue
        layer = tensor.global_offset[: tensor.prepend_axis_num]  # which layer, where layers are stacked under one name
        digest = hashlib.sha256(f"{seed}/{tensor.key}/{layer}".encode()).digest()
        generator = torch.Generator(device=tensor.data.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.randn(
            tensor.global_shape[tensor.prepend_axis_num :], generator=generator, device=tensor.data.device
        )
        residual = "linear_proj" in tensor.key or "linear_fc2" in tensor.key
        whole *= _INIT_STD / (2 * layers) ** 0.5 if residual else _INIT_STD
        offsets = tensor.global_offset[tensor.prepend_axis_num :]
        part = tuple(slice(start, start + size) for start, size in zip(offsets, tensor.local_shape, strict=True))
        tensor.data.copy_(whole[part].reshape(tensor.data.shape))
