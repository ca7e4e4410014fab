"""Pairs the parameters of the optimizer with those of the model."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from copus.backends.megatron import cpu

cpu.before_import()
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params  # noqa: E402


class MainParam(NamedTuple):
    """A parameter, or a range of one, that this rank's optimizer updates."""

    param: torch.nn.Parameter
    """The model's."""
    main: torch.nn.Parameter
    """The inner optimizer's."""
    group: dict[str, Any]
    """Its group of the inner optimizer: betas, eps and so on."""
    state: dict[str, Any]
    """Adam's state of it; empty before the first step."""
    start: int | None
    """Where `main` begins in the flattened `param`; None if `main` is the whole parameter."""
    optimizer: torch.optim.Optimizer
    """The inner optimizer."""


def main_params(optimizer: Any) -> Iterator[MainParam]:
    """All pairs of this rank.

    The distributed optimizer updates the range of a parameter that this data-parallel rank owns, if it owns any.
    """
    for wrapper in optimizer.chained_optimizers:
        inner = wrapper.optimizer
        if inner is None:  # nothing to optimise on this rank
            continue
        if isinstance(wrapper, DistributedOptimizer):
            for param, (index, order) in wrapper.model_param_group_index_map.items():
                group = inner.param_groups[index]
                main = group["params"][order]
                start = wrapper._get_model_param_range_map(param)["param"].start
                yield MainParam(param, main, group, inner.state.get(main, {}), start, inner)
            continue
        halves: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        if isinstance(wrapper, Float16OptimizerWithFloat16Params):
            for low, full in zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups, strict=True):
                halves.update(zip(full, low, strict=True))
        for group in inner.param_groups:
            for main in group["params"]:
                yield MainParam(halves.get(main, main), main, group, inner.state.get(main, {}), None, inner)


def shares_out_moments(optimizer: Any) -> bool:
    """Whether data-parallel ranks own ranges of the parameters (Megatron's distributed optimizer)."""
    return any(isinstance(wrapper, DistributedOptimizer) for wrapper in optimizer.chained_optimizers)
