"""The live tensors of a rank by their place in the whole model. Nothing is copied: what is here are views."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from copus.backends.adamw import adam_state
from copus.backends.deepspeed.built import BuiltModel
from copus.backends.deepspeed.partitions import Groups, Partition, optimizer_fields, partitions
from copus.reshard.boxes import boxes_of_range
from copus.reshard.execute import LiveState
from copus.reshard.table import MASTER, Place

_Shard = tuple[Place, Callable[[], torch.Tensor]]


def live_state(built: BuiltModel, shapes: Groups, precision: str) -> LiveState:
    """Everything that this rank holds, or is to hold."""
    return dict(_shards(built, shapes, precision))


def _shards(built: BuiltModel, shapes: Groups, precision: str) -> Iterator[_Shard]:
    adam, zero = built.adam, built.layout.zero
    assert adam is not None, "it is built"
    for group in built.groups:
        for name, param in group.items():
            if zero < 3:
                yield (name, (0,) * param.dim()), functools.partial(_data, param)
            if zero == 0:
                for field in optimizer_fields(name, tuple(param.shape), precision):
                    statistic = field.name.rpartition("/")[2]
                    yield (field.name, (0,) * param.dim()), functools.partial(_statistic, adam, param, statistic)
    if zero == 0:
        return
    rank = dist.get_rank()
    for part in partitions(shapes, built.layout):
        if part.rank != rank:
            continue
        master = built.flat_masters[part.group]
        if zero == 3:
            yield from _parts(part.name, part, functools.partial(_data, built.flat_weights[part.group]))
        for field in optimizer_fields(part.name, part.shape, precision):
            statistic = field.name.rpartition("/")[2]
            yield from _parts(field.name, part, functools.partial(_statistic, adam, master, statistic))


def _data(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data


def _statistic(adam: torch.optim.AdamW, tensor: torch.Tensor, name: str) -> torch.Tensor:
    return tensor.data if name == MASTER else adam_state(adam, tensor)[name]


def _parts(name: str, part: Partition, flat: Callable[[], torch.Tensor]) -> Iterator[_Shard]:
    """The boxes of a range that lies in a flat buffer."""
    position = part.position
    for box in boxes_of_range(part.shape, part.start, part.stop):
        yield (name, box.offset), functools.partial(_view, flat, position, box.elements, box.shape)
        position += box.elements


def _view(flat: Callable[[], torch.Tensor], position: int, elements: int, shape: tuple[int, ...]) -> torch.Tensor:
    return flat()[position : position + elements].view(shape)
