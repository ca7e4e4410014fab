"""Builds the Megatron GPT of a job in a layout, with weights that depend on the seed alone and not on the layout."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional

from copus.backends.initial_weights import initial_weight
from copus.backends.megatron import cpu
from copus.backends.vocabulary import hide_padding
from copus.job import JobConfig, TrainingConfig
from copus.kernels import TRANSFORMER_ENGINE
from copus.reshard.boxes import Box
from profiles.layout import Layout
from profiles.model_shape import ModelShape
from profiles.pipeline_split import split_layers
from profiles.rope import attention_factor, frequencies

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.common.embeddings import RotaryEmbedding  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import MLATransformerConfig, TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from copus.backends.megatron.experts import expert_options, routers  # noqa: E402
from copus.backends.megatron.groups import own_model_rank  # noqa: E402
from copus.backends.megatron.latent_attention import latent_options  # noqa: E402
from copus.backends.megatron.local_tensors import local_tensors  # noqa: E402
from copus.backends.megatron.modules import LayerModules, block_spec, torch_modules  # noqa: E402

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "squared_relu": lambda states: functional.relu(states).square(),
}


_EIGHT_BIT: dict[str, dict[str, Any]] = {
    "fp8": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}
"""Scales are of the tensors at hand, and not of a history of others (delayed scaling): so there is no state that a move
or a checkpoint would have to carry."""


def transformer_config(shape: ModelShape, layout: Layout, training: TrainingConfig) -> TransformerConfig:
    """Megatron's configuration of the model. Fusions are off: without Transformer Engine and Apex there are none, and
    gradients that a fused kernel adds to `main_grad` show nothing of a micro-batch (`part_norms`)."""
    on_cpu = not torch.cuda.is_available()
    dropout = training.dropout
    dtype = torch.bfloat16 if training.has_bf16_weights else torch.float32
    recompute = {"none": None, "selective": "selective", "full": "full"}[layout.recompute]
    kind = TransformerConfig if shape.latent_attention is None else MLATransformerConfig
    return kind(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn_hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_width,
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[shape.norm],
        layernorm_epsilon=shape.norm_epsilon,
        qk_layernorm=shape.qk_norm == "head",
        gated_linear_unit=shape.gated_mlp,
        activation_func=_ACTIVATIONS[shape.mlp_activation],
        add_bias_linear=shape.bias == "all",
        add_qkv_bias=shape.bias == "qkv",
        softmax_scale=_softmax_scale(shape),
        window_size=(shape.sliding_window - 1, 0) if shape.sliding_window else None,
        window_attn_skip_freq=shape.full_attention_every or None,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        **_uneven_stages(shape.layers, layout),
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.has_bf16_weights,
        **_EIGHT_BIT.get(training.precision, {}),
        use_cpu_initialization=on_cpu,
        # `initialize` below fills the weights; perform_initialization must stay on, because it also marks the
        # tensor-parallel weights
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
        **latent_options(shape),
        **expert_options(shape, layout, training.expert_dispatch, grouped=training.kernels == TRANSFORMER_ENGINE),
    )


def _uneven_stages(layers: int, layout: Layout) -> dict[str, Any]:
    """What Megatron is told of a pipeline whose first and last stage have fewer layers than the others."""
    if layers % (layout.pp * layout.vp) == 0:
        return {}
    if layout.vp > 1:
        return {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    split = split_layers(layers, layout.pp)
    return {
        "num_layers_in_first_pipeline_stage": int(split.first),
        "num_layers_in_last_pipeline_stage": int(split.last),
    }


def build_model(
    job: JobConfig, layout: Layout, seed: int | None, groups: ProcessGroupCollection | None = None
) -> list[DistributedDataParallel]:
    """The model chunks of this rank (one, or `vp`), wrapped in Megatron's data parallelism.

    The process groups of the layout must exist, unless `groups` stand in for them. Without a seed the weights are
    uninitialized, for the caller to fill.
    """
    shape, training = job.model, job.training
    config = transformer_config(shape, layout, training)
    if groups is not None:  # else it uses the GPU, whatever torch's default device is
        config.use_cpu_initialization = True
    pp_rank = parallel_state.get_pipeline_model_parallel_rank() if groups is None else groups.pp.rank()
    modules = _layer_modules(job, config)
    chunks: list[Any] = []
    for stage in range(layout.vp):
        vp_stage = stage if layout.vp > 1 else None
        chunk: Any = GPTModel(
            config,
            block_spec(shape, config, modules, vp_stage, pp_rank),
            shape.padded_vocab,
            shape.seq_len,
            pre_process=pp_rank == 0 and stage == 0,
            post_process=pp_rank == layout.pp - 1 and stage == layout.vp - 1,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope" if shape.positions == "rope" else "learned_absolute",
            rotary_percent=shape.rope_fraction,
            rotary_base=shape.rope_base,
            vp_stage=vp_stage,
            pg_collection=groups,
        )
        if training.kernels == TRANSFORMER_ENGINE:
            from copus.backends.megatron.transformer_engine import mark_cuts

            mark_cuts(chunk, config)
        if shape.rope_scaling is not None:
            scale_rotary_positions(chunk, shape)
        if shape.embedding_scale != 1 and chunk.pre_process:
            chunk.embedding.register_forward_hook(lambda module, inputs, output: output * shape.embedding_scale)
        if shape.vocab < shape.padded_vocab and chunk.post_process:
            chunk.output_layer.register_forward_hook(functools.partial(_hide_padding, shape.vocab))
        if torch.cuda.is_available() and groups is None:
            chunk = chunk.cuda()
        if seed is not None:
            initialize(chunk, shape, layout, seed)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    for router in routers(chunks):
        router._maintain_float32_expert_bias()  # Megatron does it in the first forward pass, after a move

    reduce = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.zero > 0,
        overlap_grad_reduce=training.overlap_grad_reduce,
        check_for_nan_in_grad=False,  # the step itself checks the norm
    )
    wrapped = [
        DistributedDataParallel(config, reduce, chunk, disable_bucketing=index > 0, pg_collection=groups)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if training.overlap_grad_reduce:  # only the last micro-batch's gradients may start a reduction
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def _layer_modules(job: JobConfig, config: TransformerConfig) -> LayerModules:
    if job.training.kernels != TRANSFORMER_ENGINE:
        return torch_modules(job.model, config)
    from copus.backends.megatron.transformer_engine import te_modules  # not everyone has it

    return te_modules(job.model, config, job.data.reset_attention_mask)


def _hide_padding(vocab: int, module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
    """Each tensor parallel rank has the logits of some tokens."""
    logits, tp_rank = output[0], parallel_state.get_tensor_model_parallel_rank()
    hide_padding(logits, vocab, first=tp_rank * logits.shape[-1])


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _softmax_scale(shape: ModelShape) -> float | None:
    """Factor of queries · keys; None for 1 / √(head width).

    YaRN's factor of sines and cosines is in it, squared: megatron's rotation of queries and of keys leaves it out.
    """
    if shape.attention_scale is None and attention_factor(shape.rope_scaling) == 1:
        return None
    return (shape.attention_scale or shape.head_width**-0.5) * attention_factor(shape.rope_scaling) ** 2


def scale_rotary_positions(chunk: Any, shape: ModelShape) -> None:
    """Megatron has Llama 3's scaling with some of its numbers fixed, and YaRN's as another module: the frequencies are
    put in the place of those that it computed. With latent attention every layer has its own."""
    scaled = frequencies(shape.rotary_width, shape.rope_base, shape.rope_scaling)
    for rotary in chunk.modules():
        if isinstance(rotary, RotaryEmbedding):
            rotary.inv_freq = torch.tensor(scaled, dtype=torch.float32, device=rotary.inv_freq.device)


@torch.no_grad()
def initialize(chunk: torch.nn.Module, model: ModelShape, layout: Layout, seed: int) -> None:
    """Fill the weights of a chunk with this rank's parts of the initial weights, one whole tensor after the other."""
    for weight, described in local_tensors(chunk, model, own_model_rank(layout)):
        here = Box.whole(described.shape)
        for field in dict.fromkeys(region.weight for region in described.regions):
            whole = initial_weight(field.name, field.shape, model.layers, seed, weight.device)
            for region in described.regions:
                if region.weight == field:
                    part = region.place(region.box).slices_in(Box.whole(field.shape))
                    weight[region.box.slices_in(here)] = whole[part]
