"""The weights and persistent buffers of a model chunk, and which part of the whole model each of them is.

Megatron marks every weight with the axis along which tensor parallel ranks cut it (`partition_dim`) and the number of
blocks that are cut by themselves (`partition_stride`: 2 for the gate and up projections of a SwiGLU), and every layer
has its number. So nothing here depends on which weights a model has.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from copus.backends.megatron import cpu
from copus.reshard.boxes import Box, boxes_of_range
from copus.reshard.table import Field

cpu.before_import()
from megatron.core.transformer.transformer_layer import BaseTransformerLayer  # noqa: E402

MASTER = "master"
"""The fp32 copy of a weight that is not fp32 itself."""
ADAM_STATISTICS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each weight: fp32 tensors of its shape."""
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Region:
    """Part of a rank's tensor that lies in one piece in the whole tensor."""

    box: Box
    """In the rank's tensor."""
    offset: tuple[int, ...]
    """Of that box in the whole tensor."""

    def place(self, part: Box) -> Box:
        """A part of the box, in coordinates of the whole tensor."""
        return part.shifted([a - b for a, b in zip(self.offset, self.box.offset, strict=True)])


@dataclass(frozen=True)
class LocalTensor:
    """A weight or a persistent buffer of a model chunk, as one tensor parallel rank has it."""

    name: str
    """Of the whole tensor: layers are counted over all pipeline stages."""
    shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    dtype: str
    regions: tuple[Region, ...]
    """Usually one; two for the gate and up projections of a SwiGLU."""
    is_trained: bool
    """Whether the optimizer has a state for it."""

    @property
    def weight(self) -> tuple[Field, ...]:
        """The tensor itself."""
        return (Field(self.name, self.dtype, self.whole_shape),)

    @property
    def optimizer_fields(self) -> tuple[Field, ...]:
        """What the optimizer keeps of it."""
        kept = ((MASTER,) if self.dtype != "float32" else ()) + ADAM_STATISTICS
        return tuple(Field(f"{self.name}/{suffix}", "float32", self.whole_shape) for suffix in kept)

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


def local_tensors(chunk: Any, tp: int, tp_rank: int) -> Iterator[tuple[torch.Tensor, LocalTensor]]:
    """The parameters of a model chunk, then its persistent buffers, each with its description on a tensor parallel
    rank. The chunk may be a live one of that rank, or any rank's on the meta device: their shapes are equal."""
    model = unwrap(chunk)
    first_layer = _first_layer(model)
    parameters = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    for local_name, tensor in {**parameters, **buffers}.items():
        name = re.sub(r"(?<=\blayers\.)\d+(?=\.)", lambda match: str(int(match[0]) + first_layer), local_name, count=1)
        if getattr(tensor, "shared_embedding", False):
            name = _EMBEDDING  # the output layer of the last stage has a copy
        shape = tuple(tensor.shape)
        axis, blocks = None, 1
        if getattr(tensor, "tensor_model_parallel", False) and tp > 1:
            axis, blocks = tensor.partition_dim, tensor.partition_stride
        regions = tuple(_regions(shape, axis, blocks, tp, tp_rank))
        whole = tuple(size * tp if index == axis else size for index, size in enumerate(shape))
        dtype = str(tensor.dtype).removeprefix("torch.")
        is_trained = local_name in parameters and tensor.requires_grad
        yield tensor, LocalTensor(name, shape, whole, dtype, regions, is_trained)


def _first_layer(model: torch.nn.Module) -> int:
    """The number of a chunk's first layer among all layers, from 0."""
    layers = (module.layer_number for module in model.modules() if isinstance(module, BaseTransformerLayer))
    return min(layers, default=1) - 1


def _regions(shape: tuple[int, ...], axis: int | None, blocks: int, tp: int, tp_rank: int) -> Iterator[Region]:
    if axis is None:
        yield Region(Box.whole(shape), (0,) * len(shape))
        return
    size = shape[axis] // blocks
    for block in range(blocks):
        box_shape = tuple(size if index == axis else length for index, length in enumerate(shape))
        offset = tuple(block * size if index == axis else 0 for index in range(len(shape)))
        whole = tuple((block * tp + tp_rank) * size if index == axis else 0 for index in range(len(shape)))
        yield Region(Box(offset, box_shape), whole)


def unwrap(chunk: Any) -> Any:
    """The model inside data parallelism and bf16 wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
