"""Megatron's process groups: made for a layout, and kept in case the job returns to it.

Creating them is much of the cost of a small move. Megatron asks for some 17 groups on every rank, most of them with the
same ranks as another. So groups with equal ranks are one group, within a layout and between layouts. That is safe
because every rank issues its collectives in the same order. Megatron itself fills its globals every time.
"""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.collectives import no_agreement
from profiles.layout import Layout

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402

from copus.backends.megatron.local_tensors import ModelRank  # noqa: E402

_Key = tuple[tuple[int, ...], str | None]
_groups: dict[_Key, Any] = {}
"""Every existing group, by ranks and backend; the same keys on every rank."""
_layouts: dict[tuple[int, ...], list[_Key]] = {}
"""The groups of a layout; the most recently used layout comes last."""
_part_group: Any = None
"""That of `part_group` in the current layout, if Megatron has none."""


def make_groups(layout: Layout, timeout_seconds: float) -> None:
    """Make the tensor, pipeline, data and expert parallel groups of a layout over all ranks, or reuse those that exist.
    Collective. Raises MidCollectiveError if this rank cannot make a group that its peers may wait for."""
    degrees = (layout.tp, layout.pp, layout.cp, layout.ep, layout.expert_tp, layout.dp)
    _layouts.pop(degrees, None)
    # Groups cost threads and sockets on a CPU, which are cheap, and device memory with NCCL.
    while len(_layouts) >= (2 if torch.cuda.is_available() else 8):
        _destroy(next(iter(_layouts)))
    used: list[_Key] = []
    original = parallel_state.create_group

    def create_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> Any:
        key = (tuple(ranks), backend)
        used.append(key)
        if key not in _groups:
            with no_agreement():
                _groups[key] = original(ranks, timeout=timeout, backend=backend, **options)
        elif dist.get_rank() in ranks:
            listed = parallel_state._global_process_group_list
            parallel_state._global_process_group_list = [*(listed or [None]), _groups[key]]
        return _groups[key]

    parallel_state.create_group = create_group
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
            distributed_timeout_minutes=timeout_seconds / 60,  # goes into a timedelta: fractions are fine
            create_gloo_process_groups=False,
        )
        _make_part_groups(layout, create_group, timeout_seconds)
    finally:
        parallel_state.create_group = original
        _layouts[degrees] = used


def _make_part_groups(layout: Layout, create_group: Callable[..., Any], timeout_seconds: float) -> None:
    """Make the groups of `part_group` that Megatron lacks: if experts are split less than all else, the expert parallel
    ranks are not those that have the same part of all else."""
    global _part_group
    _part_group = None
    if not layout.etp:
        return
    together, timeout = layout.expert_tp * layout.ep, timedelta(seconds=timeout_seconds)
    for first in range(0, layout.accelerators, together):
        for tp_rank in range(layout.tp):
            ranks = range(first + tp_rank, first + together, layout.tp)
            group = create_group(ranks, timeout=timeout, group_desc="PART_GROUP")
            if dist.get_rank() in ranks:
                _part_group = group


def own_model_rank(layout: Layout) -> ModelRank:
    """This rank's place among the tensor and the expert parallel ranks.

    The groups are asked themselves: Megatron asks torch, which has forgotten all groups after a step that broke them.
    """
    return ModelRank(
        layout.tp,
        parallel_state.get_tensor_model_parallel_group().rank(),
        layout.expert_tp,
        parallel_state.get_expert_tensor_parallel_group().rank(),
        layout.ep,
        parallel_state.get_expert_model_parallel_group().rank(),
    )


def replica_number(of_experts: bool) -> int:
    """This rank's number among those with the same part of the model: of its experts, or of all else."""
    if of_experts:
        return int(parallel_state.get_expert_data_parallel_rank())
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))


def part_group(layout: Layout, with_tensor_parallel: bool = False) -> Any:
    """The ranks whose gradients add up to that of one part of a step (`part_norms`): those that share its sequences
    out, or its experts, and have the same weights of all else. `with_tensor_parallel`, their neighbours too."""
    if layout.ep > 1:  # then whole replicas share the experts out
        if with_tensor_parallel:
            return parallel_state.get_expert_tensor_and_model_parallel_group()
        return parallel_state.get_expert_model_parallel_group() if _part_group is None else _part_group
    if with_tensor_parallel:
        return parallel_state.get_tensor_and_context_parallel_group()
    return parallel_state.get_context_parallel_group()


def leave_groups() -> None:
    """Clear Megatron's globals of the current layout. The groups stay for later use."""
    global _part_group
    _part_group = None
    parallel_state.destroy_model_parallel()
    parallel_state._global_process_group_list = None


def destroy_groups() -> None:
    """Destroy every group that `make_groups` made. Collective."""
    leave_groups()
    for degrees in list(_layouts):
        _destroy(degrees)


def forget_groups() -> None:
    """Drop every group without destroying it, after a step that broke them. Not collective."""
    leave_groups()
    _groups.clear()
    _layouts.clear()


def _destroy(degrees: tuple[int, ...]) -> None:
    """Destroy the groups that no other layout uses, in the order of their creation, which is the same on every rank.

    Megatron's own `destroy_model_parallel` only forgets them, and threads and sockets would pile up.
    """
    unused = _layouts.pop(degrees)
    used_elsewhere = {key for keys in _layouts.values() for key in keys}
    for key in dict.fromkeys(unused):
        if key not in used_elsewhere and key in _groups:
            group = _groups.pop(key)
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                with contextlib.suppress(ValueError):  # gone with the default group
                    dist.destroy_process_group(group)
