"""The geometry and the plan of a move, without processes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copus.reshard.boxes import Box, boxes_of_range
from copus.reshard.plan import Piece, make_plan

SHAPE = (12, 6)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_range_of_a_flat_tensor_is_its_boxes_in_order(shape: list[int], data: st.DataObject) -> None:
    size = int(np.prod(shape))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    tensor = np.arange(size).reshape(shape)
    boxes = list(boxes_of_range(tuple(shape), start, stop))
    whole = Box((0,) * len(shape), tuple(shape))
    parts = [tensor[box.slices_in(whole)].ravel() for box in boxes]
    assert list(np.concatenate(parts or [np.array([])])) == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1


def _box(data: st.DataObject) -> Box:
    ranges = [sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=2))) for size in SHAPE]
    return Box(tuple(low for low, _ in ranges), tuple(high - low for low, high in ranges))


@given(st.data())
def test_subtraction_leaves_exactly_the_rest(data: st.DataObject) -> None:
    box, cut = _box(data), _box(data)
    whole = Box((0, 0), SHAPE)
    seen, expected = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    for part in box.subtract(cut):
        seen[part.slices_in(whole)] += 1
    expected[box.slices_in(whole)] = 1
    expected[cut.slices_in(whole)] = 0
    assert (seen == expected).all()


def _grid(rows: int, columns: int, copies: int) -> list[list[Piece]]:
    """A tensor cut into rows × columns, each cell on `copies` ranks; by rank."""
    height, width = SHAPE[0] // rows, SHAPE[1] // columns
    cells = [Box((r * height, c * width), (height, width)) for r, c in itertools.product(range(rows), range(columns))]
    return [[Piece("w", cell, 4)] for cell in cells for _ in range(copies)]


LAYOUTS = [(1, 1, 12), (2, 1, 6), (1, 3, 4), (2, 3, 2), (4, 3, 1), (12, 1, 1), (6, 2, 1)]


@settings(max_examples=60)
@given(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_every_rank_gets_all_that_it_needs_and_only_what_it_lacks(
    before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    held, needed = _grid(*before), _grid(*after)
    plan = make_plan(held, needed)
    whole = Box((0, 0), SHAPE)
    floor = 0
    for rank in range(12):
        filled, own, target = np.zeros(SHAPE, int), np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
        for transfer in [*plan.transfers, *plan.copies]:
            if transfer.receiver == rank:
                assert held[transfer.sender][transfer.source].box.intersect(transfer.box) == transfer.box
                filled[transfer.box.slices_in(whole)] += 1
        own[held[rank][0].box.slices_in(whole)] = True
        target[needed[rank][0].box.slices_in(whole)] = True
        assert (filled == target).all()
        floor += 4 * int((target & ~own).sum())
    assert plan.bytes_moved == floor, "exactly the bytes that ranks lack"


def test_several_holders_share_the_sending() -> None:
    held = [[Piece("w", Box((0,), (8,)), 4)] for _ in range(4)] + [[] for _ in range(8)]
    needed = [[] for _ in range(4)] + [[Piece("w", Box((0,), (8,)), 4)] for _ in range(8)]
    sent = [0] * 4
    for transfer in make_plan(held, needed).transfers:
        sent[transfer.sender] += transfer.bytes
    assert sent == [64] * 4


def test_what_nobody_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match="nobody holds w"):
        make_plan([[Piece("w", Box((0,), (4,)), 4)]], [[Piece("w", Box((0,), (5,)), 4)]])
