"""The live tensors of a rank by their place in the whole model: weights, fp32 masters and optimizer statistics.

All of them are views, so describing them copies nothing. Works with and without the distributed optimizer, whose shards
are ranges of flattened parameters.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from copus.backends.megatron import cpu
from copus.backends.megatron.built import BuiltModel
from copus.backends.megatron.groups import own_model_rank
from copus.backends.megatron.local_tensors import LocalTensor, has_master, local_tensors
from copus.backends.megatron.main_params import MainParam, main_params
from copus.backends.regions import HeldWeight, Region, optimizer_state, state_fields
from copus.job import TrainingConfig
from copus.reshard.boxes import Box
from copus.reshard.execute import LiveState
from copus.reshard.table import MASTER, Place
from profiles.model_shape import ModelShape

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402

_Shard = tuple[Place, Callable[[], torch.Tensor]]


def live_state(built: BuiltModel, model: ModelShape, training: TrainingConfig) -> LiveState:
    """All shards of this rank."""
    rank = own_model_rank(built.layout)
    local = dict(pair for chunk in built.chunks for pair in local_tensors(chunk, model, rank))
    shards: LiveState = {}
    for tensor, described in local.items():
        for region in described.regions:
            shards[region.weight.name, region.offset] = functools.partial(_weight, tensor, region)
    for main in main_params(built.optimizer):
        shards.update(_optimizer_state(main, local[main.param], training))
    return shards


def _optimizer_state(main: MainParam, described: LocalTensor, training: TrainingConfig) -> Iterator[_Shard]:
    held, optimizer = held_weight(main, described), training.optimizer
    shapes = held.statistic_shapes(optimizer)
    if main.start is None:
        for region in described.regions:
            for field, axes in state_fields(region.weight, optimizer, has_master=has_master(region, training)):
                offset = tuple(region.offset[axis] for axis in axes)
                tensor = functools.partial(_statistic, main, field.name, shapes)
                yield (field.name, offset), functools.partial(_part, held, tensor, axes, region)
        return
    for region, part, position, block in described.parts_of_range(main.start, main.start + main.main.numel()):
        for field, _ in state_fields(region.weight, optimizer, has_master=has_master(region, training)):
            tensor = functools.partial(_statistic, main, field.name, shapes)
            view = functools.partial(_view, tensor, position, block, part.slices_in(block))
            yield (field.name, region.place(part).offset), view


def held_weight(main: MainParam, described: LocalTensor) -> HeldWeight:
    """What a parameter of the optimizer consists of, for its update."""
    if described.cut_axis is None:
        groups: tuple[Any, ...] = ()
    elif described.of_experts:
        groups = (parallel_state.get_expert_tensor_parallel_group(),)
    else:
        groups = (parallel_state.get_tensor_model_parallel_group(),)
    return HeldWeight(
        tuple(main.main.shape),
        described.regions,
        row_groups=groups if described.cut_axis == 0 else (),
        column_groups=groups if described.cut_axis == 1 else (),
    )


def _weight(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor.data[region.slices]


def _statistic(main: MainParam, field: str, shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
    name = field.rpartition("/")[2]
    return main.main.data if name == MASTER else optimizer_state(main.optimizer, main.main, shapes)[name]


def _part(held: HeldWeight, tensor: Callable[[], torch.Tensor], axes: tuple[int, ...], region: Region) -> torch.Tensor:
    return held.part_of(tensor(), axes, region)


def _view(tensor: Callable[[], torch.Tensor], position: int, block: Box, slices: tuple[slice, ...]) -> torch.Tensor:
    """A part of the block that begins at `position` of a flat tensor."""
    return tensor().view(-1)[position : position + block.elements].view(block.shape)[slices]
