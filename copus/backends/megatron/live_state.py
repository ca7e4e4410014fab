"""The tensors of a running job by their place in the whole model: weights, fp32 masters, and both Adam moments.

Where each lies is the arithmetic of `geometry`; what is here finds the live tensors, so nothing is copied to be
described. Works with and without the distributed optimizer, whose shards are ranges of flattened parameters.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from copus.backends.megatron import cpu
from copus.backends.megatron.built import BuiltModel
from copus.backends.megatron.geometry import OPTIMIZER, LocalParameter, chunk_parameters
from copus.backends.megatron.sharded import unwrap
from copus.backends.megatron.upstream import adam_state
from copus.reshard.boxes import Box
from copus.reshard.execute import Fields, Place, place_of
from profiles.layout import Layout
from profiles.model_shape import ModelShape

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params  # noqa: E402

_MOMENTS = ("exp_avg", "exp_avg_sq")

_Piece = tuple[Place, Callable[[], Fields]]
LiveState = dict[Place, Callable[[], Fields]]
"""For each piece of this rank what gives its tensors. Moments that are not there yet are made when they are asked
for."""


def live_state(built: BuiltModel, model: ModelShape, layout: Layout) -> LiveState:
    """Everything that this rank holds, or is to hold. Raises ValueError where the parameters are not those that
    `geometry` expects."""
    local = dict(pair for stage, chunk in enumerate(built.chunks) for pair in _match(chunk, stage, model, layout))
    found: LiveState = {}
    for param, described in local.items():
        found.update(_whole("", described, functools.partial(_data, param)))
    for wrapper in built.optimizer.chained_optimizers:
        if wrapper.optimizer is None:  # nothing to optimise on this rank
            continue
        if isinstance(wrapper, DistributedOptimizer):
            found.update(_sharded_optimizer_state(wrapper, local))
        else:
            found.update(_whole_optimizer_state(wrapper, local))
    return found


def _match(
    chunk: Any, stage: int, model: ModelShape, layout: Layout
) -> Iterator[tuple[torch.nn.Parameter, LocalParameter]]:
    # Asked of the groups themselves: `parallel_state.get_pipeline_model_parallel_rank` asks torch, which knows none any
    # more after a step that broke them.
    tensor_rank = parallel_state.get_tensor_model_parallel_group().rank()
    pipeline_rank = parallel_state.get_pipeline_model_parallel_group().rank()
    expected = chunk_parameters(model, layout, tensor_rank, pipeline_rank, stage)
    live = list(unwrap(chunk).named_parameters())
    if [(name, tuple(param.shape)) for name, param in live] != [(each.name, each.shape) for each in expected]:
        raise ValueError(f"the parameters of model chunk {stage} are not those of a {layout.label} of this model")
    for (_, param), described in zip(live, expected, strict=True):
        yield param, described


def _data(param: torch.nn.Parameter) -> Fields:
    return [param.data]


def _state(inner: torch.optim.Optimizer, main: torch.nn.Parameter, with_master: bool) -> Fields:
    state = adam_state(inner, main)
    return [main.data] * with_master + [state[name] for name in _MOMENTS]


def _whole(suffix: str, param: LocalParameter, fields: Callable[[], Fields]) -> Iterator[_Piece]:
    """Pieces of tensors that have the parameter's shape."""
    everything = Box((0,) * len(param.shape), param.shape)
    for region in param.regions:
        slices = region.box.slices_in(everything)
        yield (
            place_of(region.name + suffix, region.place(region.box)),
            lambda slices=slices: [field[slices] for field in fields()],  # type: ignore[misc]
        )


def _whole_optimizer_state(wrapper: Any, local: dict[torch.nn.Parameter, LocalParameter]) -> Iterator[_Piece]:
    """State of an optimizer that holds each parameter of the rank whole."""
    masters: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    if isinstance(wrapper, Float16OptimizerWithFloat16Params):
        for halves, fulls in zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups, strict=True):
            masters.update(zip(halves, fulls, strict=True))
    owned = {param for group in wrapper.optimizer.param_groups for param in group["params"]}
    for param, described in local.items():
        main = masters.get(param, param)
        if main in owned:
            fields = functools.partial(_state, wrapper.optimizer, main, main is not param)
            yield from _whole(OPTIMIZER, described, fields)


def _sharded_optimizer_state(
    wrapper: DistributedOptimizer, local: dict[torch.nn.Parameter, LocalParameter]
) -> Iterator[_Piece]:
    """State of the distributed optimizer: of each parameter the range that this data parallel rank owns, if any."""
    for param, (group, order) in wrapper.model_param_group_index_map.items():
        owned = wrapper._get_model_param_range_map(param)["param"]
        main = wrapper.optimizer.param_groups[group]["params"][order]
        # in fp32 the main parameter is a view of the weight itself
        fields = functools.partial(_state, wrapper.optimizer, main, param.dtype != torch.float32)
        for region, part, position, block in local[param].parts_of_range(owned.start, owned.end):
            yield (
                place_of(region.name + OPTIMIZER, region.place(part)),
                functools.partial(_views, fields, position, block, part.slices_in(block)),
            )


def _views(fields: Callable[[], Fields], position: int, block: Box, slices: tuple[slice, ...]) -> Fields:
    """A part of a block that lies from `position` on in flat tensors."""
    return [field[position : position + block.elements].view(block.shape)[slices] for field in fields()]
