"""The weights and persistent buffers of a model chunk, and which part of the state each of them is.

Megatron marks every weight with the axis along which tensor parallel ranks cut it (`partition_dim`) and the number of
blocks that are cut by themselves (`partition_stride`: 2 for the gate and up projections of a SwiGLU), and every layer
has its number: that gives the place in Megatron's whole tensor, without a list of weights. `hugging_face` says which
tensors of the state that whole tensor consists of.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from copus.backends.megatron import cpu
from copus.backends.regions import Region
from copus.job import TrainingConfig
from copus.reshard.boxes import Box, boxes_of_range
from copus.reshard.table import Field
from copus.weights.megatron_names import hugging_face_parts, without_fusion
from profiles.layout import Layout
from profiles.model_shape import ModelShape

cpu.before_import()
from megatron.core.transformer.transformer_layer import BaseTransformerLayer  # noqa: E402

_EMBEDDING = "embedding.word_embeddings.weight"
_LOCAL_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")


class ModelRank(NamedTuple):
    """Which part of every layer a rank has."""

    tp: int
    """Tensor parallel degree."""
    tp_rank: int
    expert_tp: int
    """Tensor parallel degree of the experts."""
    expert_tp_rank: int
    ep: int
    """Expert parallel degree."""
    ep_rank: int

    @classmethod
    def at(cls, place: int, layout: Layout) -> "ModelRank":
        """That of a rank by its place among the tensor, context and data parallel ranks of its stage. Megatron counts
        the ranks that split an expert, then the expert parallel ones, then the replicas of the experts."""
        expert_place = place // layout.expert_tp
        return cls(
            *(layout.tp, place % layout.tp, layout.expert_tp, place % layout.expert_tp),
            *(layout.ep, expert_place % layout.ep),
        )


@dataclass(frozen=True)
class LocalTensor:
    """A weight or a persistent buffer of a model chunk, as one rank has it."""

    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    """They cover it, from the first row to the last. Several for fused projections."""
    is_trained: bool
    """Whether the optimizer has a state for it."""
    cut_axis: int | None = None
    """The axis along which tensor parallel ranks, or those of the experts, cut it; None if all have the whole."""
    of_experts: bool = False
    """Whether it is a weight of an expert, which other ranks cut than all else."""

    def parts_of_range(self, start: int, stop: int) -> Iterator[tuple[Region, Box, int, Box]]:
        """A range of the flattened tensor, as (region, part of it, where a block begins in the range, the block around
        the part)."""
        position = 0
        for block in boxes_of_range(self.shape, start, stop):
            for region in self.regions:
                common = block.intersect(region.box)
                if common is not None:
                    yield region, common, position, block
            position += block.elements


def has_master(region: Region, training: TrainingConfig) -> bool:
    """Whether the optimizer updates an fp32 copy of the weight."""
    return region.weight.dtype != "float32" and training.has_fp32_weights


def local_tensors(chunk: Any, model: ModelShape, rank: ModelRank) -> Iterator[tuple[torch.Tensor, LocalTensor]]:
    """The parameters of a model chunk, then its persistent buffers, each with its description on a rank. The chunk may
    be a live one of that rank, or any rank's on the meta device: their shapes are equal."""
    module = unwrap(chunk)
    first_layer, first_expert = _first_layer(module), rank.ep_rank * (model.experts // rank.ep)
    parameters = dict(module.named_parameters())
    persistent = module.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    for local_name, tensor in {**parameters, **buffers}.items():
        name = without_fusion(local_name)
        name = re.sub(r"(?<=\blayers\.)\d+(?=\.)", lambda match: str(int(match[0]) + first_layer), name, count=1)
        name = _LOCAL_EXPERT.sub(lambda match: str(int(match[0]) + first_expert), name)
        if getattr(tensor, "shared_embedding", False):
            name = _EMBEDDING  # the output layer of the last stage has a copy
        shape = tuple(tensor.shape)
        axis, blocks, of_experts = None, 1, _LOCAL_EXPERT.search(name) is not None
        tp, tp_rank = (rank.expert_tp, rank.expert_tp_rank) if of_experts else (rank.tp, rank.tp_rank)
        if getattr(tensor, "tensor_model_parallel", False) and tp > 1:
            axis, blocks = tensor.partition_dim, tensor.partition_stride
        whole = tuple(size * tp if index == axis else size for index, size in enumerate(shape))
        dtype = str(tensor.dtype).removeprefix("torch.")
        regions = []
        for box, offset in _blocks(shape, axis, blocks, tp, tp_rank):
            to_local = [here - there for here, there in zip(box.offset, offset, strict=True)]
            for part in hugging_face_parts(name, whole, Box(offset, box.shape), model):
                weight = Field(part.name, dtype, part.shape)
                regions.append(Region(part.box.shifted(to_local), weight, part.offset))
        is_trained = local_name in parameters and tensor.requires_grad
        yield tensor, LocalTensor(shape, tuple(regions), is_trained, axis, of_experts)


def _first_layer(module: torch.nn.Module) -> int:
    """The number of a chunk's first layer among all layers, from 0."""
    layers = (layer.layer_number for layer in module.modules() if isinstance(layer, BaseTransformerLayer))
    return min(layers, default=1) - 1


def _blocks(
    shape: tuple[int, ...], axis: int | None, blocks: int, tp: int, tp_rank: int
) -> Iterator[tuple[Box, tuple[int, ...]]]:
    """Each block of a rank's tensor, and where it begins in Megatron's whole tensor."""
    if axis is None:
        yield Box.whole(shape), (0,) * len(shape)
        return
    size = shape[axis] // blocks
    for block in range(blocks):
        box_shape = tuple(size if index == axis else length for index, length in enumerate(shape))
        offset = tuple(block * size if index == axis else 0 for index in range(len(shape)))
        whole = tuple((block * tp + tp_rank) * size if index == axis else 0 for index in range(len(shape)))
        yield Box(offset, box_shape), whole


def unwrap(chunk: Any) -> Any:
    """The model inside data parallelism and bf16 wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
