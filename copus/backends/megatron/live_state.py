"""The live tensors of a rank by their place in the whole model: weights, fp32 masters and optimizer statistics.

All of them are views, so describing them copies nothing. Works with and without the distributed optimizer, whose shards
are ranges of flattened parameters.
"""

import functools
from collections.abc import Callable, Iterator

import torch

from copus.backends.adamw import adam_state
from copus.backends.megatron import cpu
from copus.backends.megatron.built import BuiltModel
from copus.backends.megatron.local_tensors import LocalTensor, Region, local_tensors
from copus.backends.megatron.main_params import MainParam, main_params
from copus.reshard.boxes import Box
from copus.reshard.execute import LiveState
from copus.reshard.table import MASTER, Place
from profiles.model_shape import ModelShape

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402

_Shard = tuple[Place, Callable[[], torch.Tensor]]


def live_state(built: BuiltModel, model: ModelShape) -> LiveState:
    """All shards of this rank."""
    # Ask the group itself: `parallel_state.get_tensor_model_parallel_rank` asks torch, which has forgotten all groups
    # after a step that broke them.
    tp_rank = parallel_state.get_tensor_model_parallel_group().rank()
    local = dict(pair for chunk in built.chunks for pair in local_tensors(chunk, model, built.layout.tp, tp_rank))
    shards: LiveState = {}
    for tensor, described in local.items():
        for region in described.regions:
            shards[region.weight.name, region.offset] = _part_of(described, region, functools.partial(_data, tensor))
    for main in main_params(built.optimizer):
        shards.update(_optimizer_state(main, local[main.param]))
    return shards


def _optimizer_state(main: MainParam, described: LocalTensor) -> Iterator[_Shard]:
    if main.start is None:
        for region in described.regions:
            for name, tensor in _statistics(main, region):
                yield (name, region.offset), _part_of(described, region, tensor)
        return
    for region, part, position, block in described.parts_of_range(main.start, main.start + main.main.numel()):
        for name, tensor in _statistics(main, region):
            view = functools.partial(_view, tensor, position, block, part.slices_in(block))
            yield (name, region.place(part).offset), view


def _statistics(main: MainParam, region: Region) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The name of every optimizer field, and a function that returns the optimizer's tensor of it."""
    for field in region.optimizer_fields:
        yield field.name, functools.partial(_statistic, main, field.name.rpartition("/")[2])


def _data(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data


def _statistic(main: MainParam, name: str) -> torch.Tensor:
    return main.main.data if name == MASTER else adam_state(main.optimizer, main.main)[name]


def _part_of(described: LocalTensor, region: Region, tensor: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that returns the region of a tensor that has the described shape."""
    return functools.partial(_part, tensor, region.box.slices_in(Box.whole(described.shape)))


def _part(tensor: Callable[[], torch.Tensor], slices: tuple[slice, ...]) -> torch.Tensor:
    return tensor()[slices]


def _view(tensor: Callable[[], torch.Tensor], position: int, block: Box, slices: tuple[slice, ...]) -> torch.Tensor:
    """A part of the block that begins at `position` of a flat tensor."""
    return tensor().view(-1)[position : position + block.elements].view(block.shape)[slices]
