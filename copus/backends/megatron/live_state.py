"""The live tensors of a rank by their place in the whole model: weights, fp32 masters, and what the optimizer keeps.

Nothing is copied to be described: what is here are views. Works with and without the distributed optimizer, whose
shards are ranges of flattened parameters.
"""

import functools
from collections.abc import Callable, Iterator

import torch

from copus.backends.megatron import cpu
from copus.backends.megatron.built import BuiltModel
from copus.backends.megatron.local_tensors import MASTER, LocalTensor, local_tensors
from copus.backends.megatron.main_params import MainParam, main_params
from copus.backends.megatron.upstream import adam_state
from copus.reshard.boxes import Box
from copus.reshard.execute import LiveState
from copus.reshard.table import Place

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402

_Shard = tuple[Place, Callable[[], torch.Tensor]]


def live_state(built: BuiltModel) -> LiveState:
    """Everything that this rank holds, or is to hold."""
    # The group itself is asked: `parallel_state.get_tensor_model_parallel_rank` asks torch, which knows no groups any
    # more after a step that broke them.
    tp_rank = parallel_state.get_tensor_model_parallel_group().rank()
    local = dict(pair for chunk in built.chunks for pair in local_tensors(chunk, built.layout.tp, tp_rank))
    shards: LiveState = {}
    for tensor, described in local.items():
        shards.update(_whole(described.name, described, functools.partial(_data, tensor)))
    for main in main_params(built.optimizer):
        shards.update(_optimizer_state(main, local[main.param]))
    return shards


def _optimizer_state(main: MainParam, described: LocalTensor) -> Iterator[_Shard]:
    for field in described.optimizer_fields:
        statistic = field.name.rpartition("/")[2]
        tensor = functools.partial(_statistic, main, statistic)
        if main.start is None:
            yield from _whole(field.name, described, tensor)
            continue
        for region, part, position, block in described.parts_of_range(main.start, main.start + main.main.numel()):
            yield (
                (field.name, region.place(part).offset),
                functools.partial(_view, tensor, position, block, part.slices_in(block)),
            )


def _data(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data


def _statistic(main: MainParam, name: str) -> torch.Tensor:
    return main.main.data if name == MASTER else adam_state(main.optimizer, main.main)[name]


def _whole(name: str, described: LocalTensor, tensor: Callable[[], torch.Tensor]) -> Iterator[_Shard]:
    """Shards of a tensor that has the described one's shape."""
    everything = Box.whole(described.shape)
    for region in described.regions:
        slices = region.box.slices_in(everything)
        yield (name, region.offset), functools.partial(_part, tensor, slices)


def _part(tensor: Callable[[], torch.Tensor], slices: tuple[slice, ...]) -> torch.Tensor:
    return tensor()[slices]


def _view(tensor: Callable[[], torch.Tensor], position: int, block: Box, slices: tuple[slice, ...]) -> torch.Tensor:
    """A part of a block that lies from `position` on in a flat tensor."""
    return tensor().view(-1)[position : position + block.elements].view(block.shape)[slices]
