"""Leaving a step that one rank cannot finish, and forming the groups anew: without a model."""

import os
import signal
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from copus import oom_recovery
from copus.collectives import RankError
from copus.devices import join_world, wait_for
from copus.oom_recovery import World
from tests.ranks import NCCL, own_device, run_ranks


def on_tcp(timeout_seconds: float = 60.0) -> None:
    """Form the default group over a key-value store that has connections too, as torch's launchers do."""
    rank, size = dist.get_rank(), dist.get_world_size()
    port = [dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False) if rank == 0 else None]
    number = [port[0].port if port[0] is not None else None]
    dist.broadcast_object_list(number)
    dist.destroy_process_group()
    store = port[0] or dist.TCPStore("127.0.0.1", number[0], size, False)
    join_world(own_device(), timedelta(seconds=timeout_seconds), store=store, rank=rank, world_size=size)


def _sum() -> float:
    ones = torch.ones(1, device=own_device())
    dist.all_reduce(ones)
    return ones.item()


def _step(world: World, error: Exception | None, group: Any) -> None:
    with world.trial() as trial:
        if error is not None:
            raise error
        dist.all_reduce(torch.ones(1000, device=own_device()), group=group)
        wait_for(own_device())
        trial.commit()  # raises where the groups were broken: on NCCL nothing else does


def _rounds(victims: list[int]) -> list[str]:
    """What every rank is told where victims run out of memory while the others wait, each round in another way."""
    on_tcp()
    world, said = World(own_device(), timeout_seconds=60), []
    rank, size = dist.get_rank(), dist.get_world_size()
    for number, victim in enumerate(victims):
        pair = dist.new_group([victim, (victim + 1) % size])
        dist.barrier()
        waits_for_victim = pair if rank == (victim + 1) % size and number % 2 else None
        with pytest.raises(RankError) as caught:
            _step(world, torch.OutOfMemoryError(f"round {number}") if rank == victim else None, waits_for_victim)
        assert caught.value.out_of_memory
        said.append(str(caught.value))
        world.reform()
        assert _sum() == size
    return said


@pytest.mark.dist
def test_all_leave_and_form_anew() -> None:
    told = [f"rank {victim}: OutOfMemoryError: round {number}" for number, victim in enumerate([0, 1, 2, 0])]
    assert run_ranks(3, _rounds, [0, 1, 2, 0]) == [told] * 3


def _host_hangs() -> bool:
    """The rank that serves the store stops in the middle of a step. Whether the step failed here."""
    pids: list[Any] = [os.getpid()]
    dist.broadcast_object_list(pids)
    on_tcp(timeout_seconds=1.0)
    oom_recovery._GRACE_SECONDS = 0.5
    world, failed = World(own_device(), timeout_seconds=1.0), False
    try:
        with world.trial():
            if dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            _sum()
    except RuntimeError:
        failed = True
    os.kill(pids[0], signal.SIGCONT)
    world._timeout = timedelta(seconds=60)
    world.reform()  # for the end of the test
    return failed


@pytest.mark.dist
@pytest.mark.skipif(NCCL in os.environ, reason="NCCL's watchdog ends a process that waits for longer than its timeout")
def test_a_store_that_hangs_is_not_waited_for() -> None:
    assert run_ranks(2, _host_hangs)[1]


def _other_failures() -> list[str]:
    """Errors that are nobody's lack of memory, or come when it is too late, are raised as they are."""
    rank, said = dist.get_rank(), []
    world = World(own_device(), timeout_seconds=0.5)
    with world.trial() as trial:
        _sum()
        trial.commit()
    for error in (ValueError("wrong"), torch.OutOfMemoryError("the others are a step ahead"), MemoryError("late")):
        try:
            with world.trial() as trial:
                if isinstance(error, MemoryError) or (rank and isinstance(error, torch.OutOfMemoryError)):
                    trial.commit()
                if rank == 0 or not isinstance(error, torch.OutOfMemoryError):
                    raise error
        except Exception as raised:
            said.append(type(raised).__name__)
    world._timeout = timedelta(seconds=60)
    world.reform()  # the second broke the groups
    return said


@pytest.mark.dist
def test_nothing_else_is_taken_for_a_lack_of_memory() -> None:
    everything = ["ValueError", "OutOfMemoryError", "MemoryError"]
    assert run_ranks(2, _other_failures) == [everything, ["ValueError", "MemoryError"]]
