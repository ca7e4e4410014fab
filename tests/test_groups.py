"""Megatron's process groups: one for all purposes with equal ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from copus.backends.megatron import groups
from copus.profiling.single import world_of_one
from profiles.layout import Layout
from tests.megatron_jobs import backend_of, configuration, tiny_job
from tests.ranks import run_ranks

parallel_state: Any = groups.parallel_state


def _count() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def _after_moves(layouts: list[dict[str, Any]]) -> list[int]:
    """How many groups this rank is in after each move."""
    backend = backend_of(tiny_job(dist.get_world_size(), layouts[0], micro_batch=2))
    counts = []
    for layout in layouts:
        backend.move(configuration(8, 2, **layout))
        counts.append(_count())
    return counts


@pytest.mark.dist
def test_layouts_share_groups_with_equal_ranks() -> None:
    """The default group, one of both ranks, and one of this rank alone."""
    assert run_ranks(2, _after_moves, [{"tp": 2}, {"dp": 2}, {"pp": 2}] * 3) == [[3] * 9] * 2


def _last_rank_without_memory_for_groups() -> None:
    if dist.get_rank() == 1:

        def no_room(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("no room for a communicator")

        parallel_state.create_group = no_room
    backend_of(tiny_job(dist.get_world_size(), {"tp": 2}))


@pytest.mark.dist
def test_a_rank_that_cannot_make_a_group_ends_at_once_and_waits_for_nobody() -> None:
    """Its peers wait in the group's rendezvous, where no message reaches them; the launcher ends them."""
    with pytest.raises(RuntimeError, match=r"rank 1:[\s\S]*MidCollectiveError: OutOfMemoryError: no room for a comm"):
        run_ranks(2, _last_rank_without_memory_for_groups, timeout_seconds=60)


def _in_worlds_of(layouts: list[Layout]) -> list[int]:
    dist.destroy_process_group()
    counts = []
    for layout in layouts:
        with world_of_one(layout.accelerators, 0):
            groups.make_groups(layout, timeout_seconds=600)
            counts.append(_count())
            groups.destroy_groups()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return counts


@pytest.mark.dist
def test_a_rank_of_a_thousand_is_in_no_more_groups_than_a_rank_of_eight() -> None:
    """The default group; TP, PP, DP; TP with PP, and with DP; all; both ends of the pipeline; this rank alone."""
    layouts = [Layout(tp=2, pp=4, dp=2), Layout(tp=8, pp=8, dp=16)]
    assert run_ranks(1, _in_worlds_of, layouts)[0] == [9, 9]
