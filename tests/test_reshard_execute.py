"""Carrying a plan out, without megatron: what is filled, what is freed when, and how much is staged."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus.reshard import execute
from copus.reshard.boxes import Box
from copus.reshard.execute import _Work, place_of, reshard
from copus.reshard.pieces import Pieces
from copus.reshard.plan import make_plan
from tests.ranks import own_device, run_ranks

NAMES = [f"layer{index}" for index in range(6)]
SHAPE = (8, 12)


def _rows_of(rank: int) -> Box:
    return Box((2 * rank, 0), (2, 12))


def _columns_of(rank: int) -> Box:
    return Box((0, 3 * rank), (8, 3))


HELD = Pieces.of((rank, name, _rows_of(rank), 12) for rank in range(4) for name in NAMES)
NEEDED = Pieces.of((rank, name, _columns_of(rank), 12) for rank in range(4) for name in NAMES)


def _truth(name: str) -> list[torch.Tensor]:
    """Two tensors under one name, of different types: 8 + 4 = 12 bytes."""
    start = 1000 * NAMES.index(name)
    values = torch.arange(start, start + 96, device=own_device()).reshape(SHAPE)
    return [values.double(), -values.int()]


def _transpose(staging_bytes: int, alone: int) -> dict[str, Any]:
    """From rows to columns; how much of old and new there was at the most."""
    execute.ALONE = alone  # in this rank, which is a process of its own
    rank = dist.get_rank()
    box, wanted = _rows_of(rank), _columns_of(rank)
    whole = Box((0, 0), SHAPE)
    held = {place_of(name, box): [field[box.slices_in(whole)].clone() for field in _truth(name)] for name in NAMES}
    made: dict[str, list[torch.Tensor]] = {}
    most = 0

    def fields(name: str) -> list[torch.Tensor]:
        nonlocal most
        if name not in made:
            made[name] = [
                torch.empty(wanted.shape, dtype=dtype, device=own_device()) for dtype in (torch.float64, torch.int32)
            ]
        most = max(most, len(held) + len(made))
        return made[name]

    needed = {place_of(name, wanted): lambda name=name: fields(name) for name in NAMES}
    reshard(make_plan(HELD, NEEDED), held, needed, staging_bytes, own_device())
    right = all(
        torch.equal(field, expected[wanted.slices_in(whole)])
        for name in NAMES
        for field, expected in zip(made[name], _truth(name), strict=True)
    )
    return {"right": right, "left": len(held), "most": most}


@pytest.mark.dist
@pytest.mark.parametrize(("staging_bytes", "alone"), [(12, 1), (500, execute.ALONE), (2**20, 1), (2**20, 40)])
def test_rows_become_columns_and_the_old_is_freed(staging_bytes: int, alone: int) -> None:
    """`alone`: bytes from which on a part, of 6 doubles or integers, is a message of its own: all, none, or doubles."""
    for result in run_ranks(4, _transpose, staging_bytes, alone):
        assert result["right"]
        assert result["left"] == 0
        if staging_bytes < 2**20:
            assert result["most"] <= len(NAMES) + 2, "old and new are never there together"


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
                    (number, message.bytes, [part.name for part in message.transfers])
                    for number, messages in enumerate(work.rounds)
                    for message in messages
                    if (message.sender, message.receiver) == (one, other)
                ]
                for work in (works[one], works[other])
            ]
            assert seen[0] == seen[1]


def _unlike() -> str:
    rank = dist.get_rank()
    whole = Box((0, 0), SHAPE)
    held = {place_of(n, _rows_of(rank)): [f[_rows_of(rank).slices_in(whole)] for f in _truth(n)] for n in NAMES}
    if rank == 1:
        held.popitem()
    needed = {place_of(name, _columns_of(rank)): lambda: [] for name in NAMES}
    with pytest.raises(ValueError, match=r"planned") as caught:
        reshard(make_plan(HELD, NEEDED), held, needed, 500, own_device())
    assert len(held) == len(NAMES) - (rank == 1), "nothing was consumed"
    return str(caught.value)


@pytest.mark.dist
def test_what_is_not_as_planned_is_refused_on_every_rank() -> None:
    messages = run_ranks(4, _unlike)
    assert "held on rank 1" in messages[1]
    assert "1 other ranks" in messages[0]


def test_tables_add_up() -> None:
    assert HELD.bytes.sum() == NEEDED.bytes.sum() == 12 * 96 * len(NAMES)
    assert np.array_equal(Pieces.concatenate([HELD, NEEDED]).bytes, np.concatenate([HELD.bytes, NEEDED.bytes]))
