"""Builds the model of a job in a layout: transformers' own, cut over tensor parallel ranks, then sharded by FSDP."""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from copus.backends.fsdp.built import ShardedParameter
from copus.backends.fsdp.mesh import REPLICATE, SHARD, TENSOR
from copus.backends.fsdp.shards import CUT_BY_COLUMNS, CUT_BY_ROWS
from copus.backends.huggingface import build_causal_lm, restore_rotary_frequencies
from copus.backends.initial_weights import initial_weight
from copus.job import JobConfig
from copus.reshard.boxes import Box
from profiles.layout import Layout
from profiles.model_shape import ModelShape


def parameter_shapes(shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    """Names and whole shapes of the parameters, in the model's order; a tied output layer is no parameter of its
    own."""
    model = build_causal_lm(shape, torch.float32, torch.device("meta"), None)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def build_model(job: JobConfig, layout: Layout, mesh: DeviceMesh, device: torch.device) -> Any:
    """The sharded model, its weights whatever lies in memory. Never whole on any rank."""
    shape = job.model
    training = job.training
    dtype = torch.float32 if training.has_fp32_weights else torch.bfloat16
    model = build_causal_lm(shape, dtype, torch.device("meta"), None, layout.recompute, training.compile)
    if layout.tp > 1:
        _cut_matrices(model, mesh[TENSOR])
    lean = training.optimizer_in_backward
    # Without `reshard_after_forward` a layer's weights stay gathered until its backward pass: ZeRO-1 and 2. Gradients
    # are reduced in fp32, but of one rank, whose bf16 gradients would only be copied, to and fro.
    options: dict[str, Any] = {
        "mesh": mesh[REPLICATE, SHARD] if mesh[REPLICATE].size() > 1 else mesh[SHARD],
        "mp_policy": MixedPrecisionPolicy(
            torch.bfloat16 if training.precision == "bf16" else None, None if lean else torch.float32
        ),
    }
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=layout.zero == 3 or lean, **options)
    fully_shard(model, reshard_after_forward=False, **options)  # embeddings, last norm and output layer
    model.to_empty(device=device)
    model.tie_weights()
    restore_rotary_frequencies(model)
    return model


def _cut_matrices(model: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism (1909.08053): columns of the first matrix of a pair, rows of the second, one all-reduce."""
    plan: dict[str, ParallelStyle] = {}
    for name, _ in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind == "embed_tokens":
            plan[name] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        elif kind == "lm_head":  # the loss reads logits that are split over the vocabulary
            plan[name] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        elif kind in CUT_BY_ROWS:
            plan[name] = ColwiseParallel()
        elif kind in CUT_BY_COLUMNS:
            plan[name] = RowwiseParallel()
    parallelize_module(model, mesh, plan)
    model.tie_weights()


@torch.no_grad()
def initialize(sharded: ShardedParameter, job: JobConfig) -> None:
    """Fill this rank's part of a parameter: a function of the seed and of the name, the same on every layout, and with
    bf16 on every backend: masters begin as what bf16 has of the weight."""
    whole = initial_weight(sharded.name, sharded.whole_shape, job.model.layers, job.training.seed, sharded.main.device)
    if job.training.precision == "bf16":
        whole = whole.to(torch.bfloat16)
    sharded.main.copy_(whole[sharded.box.slices_in(Box.whole(sharded.whole_shape))])
