"""Carrying a plan out, without megatron: what is filled, what is freed when, and how much is staged."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus.reshard import execute
from copus.reshard.boxes import Box
from copus.reshard.execute import _Work, misfit, reshard
from copus.reshard.plan import make_plan
from copus.reshard.table import Field, Place, ShardTable
from tests.ranks import own_device, run_ranks

NAMES = [f"layer{index}" for index in range(6)]
SHAPE = (8, 12)
TYPES = {"": torch.float64, "/counts": torch.int32}
"""Two tensors under each name, 8 + 4 = 12 bytes an element."""


def _rows_of(rank: int) -> Box:
    return Box((2 * rank, 0), (2, 12))


def _columns_of(rank: int) -> Box:
    return Box((0, 3 * rank), (8, 3))


def _fields(name: str) -> tuple[Field, ...]:
    return tuple(Field(name + suffix, str(dtype).removeprefix("torch."), SHAPE) for suffix, dtype in TYPES.items())


HELD = ShardTable.of((rank, _fields(name), _rows_of(rank)) for rank in range(4) for name in NAMES)
NEEDED = ShardTable.of((rank, _fields(name), _columns_of(rank)) for rank in range(4) for name in NAMES)


def _truth(name: str) -> dict[str, torch.Tensor]:
    start = 1000 * NAMES.index(name)
    values = torch.arange(start, start + 96, device=own_device()).reshape(SHAPE)
    return {name + suffix: (-values if suffix else values).to(dtype) for suffix, dtype in TYPES.items()}


def _parts(box: Box) -> dict[Place, torch.Tensor]:
    """A part of every tensor."""
    slices = box.slices_in(Box.whole(SHAPE))
    return {(field, box.offset): tensor[slices].clone() for name in NAMES for field, tensor in _truth(name).items()}


class _HostTensor(torch.Tensor):
    """A tensor that is not on the rank's device, also where that is the CPU: it says that it is on another."""

    device = torch.device("meta")  # type: ignore[assignment]


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu() if tensor.is_cuda else tensor.as_subclass(_HostTensor)


class _CheckedOperation(dist.P2POp):
    """A message, which has to lie on the device that communicates."""

    def __init__(self, operation: Any, tensor: torch.Tensor, *arguments: Any, **options: Any) -> None:
        assert tensor.device.type == own_device().type, "what lies on the host goes through the staging buffer"
        super().__init__(operation, tensor, *arguments, **options)


def _transpose(staging_bytes: int, alone: int, on_host: str = "") -> dict[str, Any]:
    """From rows to columns; how much of old and new there was at the most. `on_host` is what lies there: `held` or
    `needed`, as when the optimizer's state leaves the host or goes there."""
    execute.ALONE = alone  # in this rank, which is a process of its own
    dist.P2POp = _CheckedOperation
    rank = dist.get_rank()
    wanted = _columns_of(rank)
    held, expected = _parts(_rows_of(rank)), _parts(wanted)
    if on_host == "held":
        held = {place: _on_host(tensor) for place, tensor in held.items()}
    made: dict[Place, torch.Tensor] = {}
    most = 0

    def make(place: Place) -> torch.Tensor:
        nonlocal most
        if place not in made:
            made[place] = torch.empty_like(expected[place])
            if on_host == "needed":
                made[place] = _on_host(made[place])
        most = max(most, len(held) + len(made))
        return made[place]

    needed = {place: lambda place=place: make(place) for place in expected}
    reshard(make_plan(HELD, NEEDED), held, needed, staging_bytes, own_device())
    right = all(made[place].tolist() == tensor.tolist() for place, tensor in expected.items())
    return {"right": right, "left": len(held), "most": most}


@pytest.mark.dist
@pytest.mark.parametrize(("staging_bytes", "alone"), [(12, 1), (500, execute.ALONE), (2**20, 1), (2**20, 40)])
def test_rows_become_columns_and_the_old_is_freed(staging_bytes: int, alone: int) -> None:
    """`alone`: bytes from which on a part, of 6 doubles or integers, is a message of its own: all, none, or doubles."""
    for result in run_ranks(4, _transpose, staging_bytes, alone):
        assert result["right"]
        assert result["left"] == 0
        if staging_bytes < 2**20:
            assert result["most"] <= 2 * (len(NAMES) + 2), "old and new are never there together"


@pytest.mark.dist
@pytest.mark.parametrize("on_host", ["held", "needed"])
def test_what_lies_on_the_host_is_sent_and_received_through_the_device(on_host: str) -> None:
    for result in run_ranks(4, _transpose, 2**20, 40, on_host):
        assert result["right"]


@pytest.mark.parametrize("staging_bytes", [96, 500, 5000])
def test_no_round_stages_more_than_it_may(staging_bytes: int) -> None:
    plan = make_plan(HELD, NEEDED)
    works = [_Work(plan, rank, staging_bytes) for rank in range(4)]
    for rank, work in enumerate(works):
        for messages in work.rounds:
            assert sum(message.bytes for message in messages) <= staging_bytes
        moved = sum(message.bytes for messages in work.rounds for message in messages if message.receiver == rank)
        assert moved == 12 * len(NAMES) * (24 - 6)
        assert len(work.copies) == len(NAMES)


def test_both_ends_cut_alike() -> None:
    """The messages between two ranks have the same sizes in the same rounds on both."""
    plan = make_plan(HELD, NEEDED)
    works = [_Work(plan, rank, 500) for rank in range(4)]
    for one in range(4):
        for other in range(4):
            seen = [
                [
                    (number, message.bytes, [part.names for part in message.transfers])
                    for number, messages in enumerate(work.rounds)
                    for message in messages
                    if (message.sender, message.receiver) == (one, other)
                ]
                for work in (works[one], works[other])
            ]
            assert seen[0] == seen[1]


def _odd() -> bool:
    """A number, and the middle of a tensor of three axes, from rank 0 to rank 1."""
    fields = Field("steps", "int64", ()), Field("cube", "float32", (4, 6, 2))
    inner = Box((1, 0, 1), (2, 6, 1))
    held = ShardTable.of((0, (field,), Box.whole(field.shape)) for field in fields)
    needed = ShardTable.of([(1, fields[:1], Box((), ())), (1, fields[1:], inner)])
    steps, cube = torch.tensor(7), torch.arange(48.0).reshape(4, 6, 2)
    have = {("steps", ()): steps, ("cube", (0, 0, 0)): cube} if dist.get_rank() == 0 else {}
    want = {("steps", ()): torch.zeros_like(steps), ("cube", (1, 0, 1)): torch.zeros(2, 6, 1)}
    gives = {place: lambda place=place: want[place] for place in want} if dist.get_rank() else {}
    reshard(make_plan(held, needed), have, gives, 2**20, own_device())
    expected = [steps, cube[inner.slices_in(Box.whole((4, 6, 2)))]]
    return dist.get_rank() == 0 or all(map(torch.equal, want.values(), expected))


@pytest.mark.dist
def test_numbers_and_tensors_of_three_axes_move_too() -> None:
    assert run_ranks(2, _odd) == [True, True]


def test_a_shard_that_is_not_as_planned_is_named() -> None:
    live = {(name + suffix, (2, 0)) for name in NAMES for suffix in TYPES}
    assert misfit("held", HELD, 1, live) is None
    assert misfit("held", HELD, 1, live - {("layer3", (2, 0))}) == (
        "the state held on rank 1 is not as planned: layer3 from [2, 0] on"
    )


def test_tables_add_up() -> None:
    assert HELD.bytes.sum() == NEEDED.bytes.sum() == 12 * 96 * len(NAMES)
    assert np.array_equal(ShardTable.concatenate([HELD, NEEDED]).bytes, np.concatenate([HELD.bytes, NEEDED.bytes]))
