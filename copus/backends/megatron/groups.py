"""Megatron's process groups: made for a layout, and destroyed for the next one."""

import contextlib

import torch.distributed as dist

from copus.backends.megatron import cpu
from profiles.layout import Layout

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402


def make_groups(layout: Layout, timeout_seconds: float) -> None:
    """Make the tensor, pipeline and data parallel groups of a layout over all ranks."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=timeout_seconds / 60,  # goes into a timedelta: fractions are fine
        create_gloo_process_groups=False,
    )


def destroy_groups() -> None:
    """Destroy every group that `make_groups` made.

    `parallel_state.destroy_model_parallel` only forgets them, and not all of them: their threads and sockets would pile
    up with every move. The list is the same on every rank, and so is the order.
    """
    for group in list(parallel_state._global_process_group_list or [])[1:]:
        with contextlib.suppress(ValueError):  # a group that this rank is no member of
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    parallel_state._global_process_group_list = None
