"""The geometry and the plan of a move, without processes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copus.reshard.boxes import Box, boxes_of_range
from copus.reshard.pieces import Pieces, Row
from copus.reshard.plan import Plan, make_plan

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


def _grid(rows: int, columns: int, copies: int) -> Pieces:
    """A tensor cut into rows × columns, each cell on `copies` ranks."""
    height, width = SHAPE[0] // rows, SHAPE[1] // columns
    cells = [Box((r * height, c * width), (height, width)) for r, c in itertools.product(range(rows), range(columns))]
    return Pieces.of((rank, "w", cells[rank // copies], 4) for rank in range(len(cells) * copies))


def _ranges(shares: int, copies: int) -> Pieces:
    """A tensor cut as a distributed optimizer does: ranges of it when flat, in up to three boxes each."""
    bounds = np.linspace(0, np.prod(SHAPE), shares + 1).astype(int).tolist()
    rows: list[Row] = []
    for share, (start, stop) in enumerate(itertools.pairwise(bounds)):
        for copy in range(copies):
            rows += [(share * copies + copy, "w", box, 4) for box in boxes_of_range(SHAPE, start, stop)]
    return Pieces.of(rows)


TABLES = [_grid(1, 1, 12), _grid(2, 1, 6), _grid(1, 3, 4), _grid(2, 3, 2), _grid(4, 3, 1), _grid(12, 1, 1)]
TABLES += [_ranges(12, 1), _ranges(5, 2), _ranges(4, 3)]


def _count(pieces: Pieces) -> np.ndarray:
    """How often each element is there."""
    seen = np.zeros(SHAPE, int)
    for (top, left), (bottom, right) in zip(*(each.tolist() for each in (pieces.start, pieces.stop)), strict=True):
        seen[top:bottom, left:right] += 1
    return seen


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(TABLES), st.sampled_from(TABLES), st.sampled_from([None, 1, 4]))
def test_every_rank_gets_all_that_it_needs_and_only_what_it_lacks(
    held: Pieces, needed: Pieces, ranks_per_node: int | None
) -> None:
    plan = make_plan(held, needed, ranks_per_node)
    floor = 0
    for rank in range(12):
        own, target = (_count(table.of_rank(rank)) for table in (held, needed))
        filled = np.zeros(SHAPE, int)
        for row in np.flatnonzero(plan.receiver == rank):
            source, goal = plan.source[row], plan.target[row]
            assert held.rank[source] == plan.sender[row]
            assert needed.rank[goal] == rank
            for table, piece in ((held, source), (needed, goal)):
                assert (table.start[piece] <= plan.start[row]).all()
                assert (plan.stop[row] <= table.stop[piece]).all()
            (top, left), (bottom, right) = plan.start[row], plan.stop[row]
            filled[top:bottom, left:right] += 1
            assert plan.bytes[row] == 4 * (bottom - top) * (right - left)
        assert (filled == target).all()
        floor += 4 * int(((target > 0) & (own == 0)).sum())
    assert plan.bytes_moved == floor, "exactly the bytes that ranks lack"


def _full(holders: range, receivers: range, tensors: int = 1) -> tuple[Pieces, Pieces]:
    whole = Box((0,), (8,))
    names = [f"w{index}" for index in range(tensors)]
    return tuple(  # type: ignore[return-value]
        Pieces.of((rank, name, whole, 4) for rank in ranks for name in names) for ranks in (holders, receivers)
    )


def _sent(plan: Plan, ranks: int) -> list[int]:
    return plan.bytes_sent(ranks).tolist()


def test_several_holders_share_the_sending() -> None:
    assert _sent(make_plan(*_full(range(4), range(4, 12))), 12) == [64] * 4 + [0] * 8


def test_holders_share_where_each_tensor_has_one_receiver_only() -> None:
    """Sharing goes over tensors, not only over the receivers of one."""
    assert _sent(make_plan(*_full(range(4), range(4, 5), tensors=8)), 5) == [64] * 4 + [0]


def test_holders_on_the_same_node_are_preferred() -> None:
    held = Pieces.of((rank, "w", Box((0,), (8,)), 4) for rank in (0, 4))
    needed = Pieces.of((rank, "w", Box((0,), (8,)), 4) for rank in (1, 2, 5, 6))
    plan = make_plan(held, needed, ranks_per_node=4)
    assert sorted(zip(plan.sender.tolist(), plan.receiver.tolist(), strict=True)) == [(0, 1), (0, 2), (4, 5), (4, 6)]


def test_others_help_a_node_that_would_have_to_send_too_much() -> None:
    """Seven receivers sit beside one of two holders: it must not serve them all."""
    held = Pieces.of((rank, f"w{tensor}", Box((0,), (8,)), 4) for rank in (0, 8) for tensor in range(16))
    needed = Pieces.of((rank, f"w{tensor}", Box((0,), (8,)), 4) for rank in range(1, 8) for tensor in range(16))
    sent = _sent(make_plan(held, needed, ranks_per_node=8), 16)
    assert sent[0] == sent[8]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sets(st.integers(0, 7), min_size=1)), min_size=1, max_size=8),
    st.lists(st.integers(0, 15), min_size=1, max_size=6),
)
def test_nobody_who_sends_too_much_could_be_relieved(tensors: list[tuple[int, set[int]]], receivers: list[int]) -> None:
    """Tensors of any size, each held by some ranks of two nodes. Who helps first may need help afterwards."""
    rows = [(f"w{index}", Box((0,), (size,)), holders) for index, (size, holders) in enumerate(tensors)]
    held = Pieces.of((rank, name, box, 4) for name, box, holders in rows for rank in sorted(holders))
    needed = Pieces.of((rank, name, box, 4) for name, box, _ in rows for rank in sorted(set(receivers)))
    plan = make_plan(held, needed, ranks_per_node=4)
    ranks = 1 + max(*receivers, *(max(holders) for _, _, holders in rows))
    sent = plan.bytes_sent(ranks)
    for row in np.flatnonzero(plan.moves):
        name, sender = plan.names[plan.name[row]], plan.sender[row]
        if sent[sender] > 1.1 * sent.mean():
            holders = next(holders for each, _, holders in rows if each == name)
            assert all(sent[other] + plan.bytes[row] >= sent[sender] for other in holders - {sender})


def test_what_nobody_holds_is_an_error() -> None:
    held = Pieces.of([(0, "w", Box((0,), (4,)), 4)])
    with pytest.raises(ValueError, match="nobody holds all of w"):
        make_plan(held, Pieces.of([(0, "w", Box((0,), (5,)), 4)]))
    with pytest.raises(ValueError, match="nobody holds all of v"):
        make_plan(held, Pieces.of([(0, "v", Box((0,), (4,)), 4)]))


def test_parts_that_overlap_are_an_error() -> None:
    """Else a hole and an overlap of one size could cancel out."""
    held = Pieces.of([(0, "w", Box((0,), (4,)), 4), (1, "w", Box((2,), (4,)), 4)])
    with pytest.raises(ValueError, match="overlap"):
        make_plan(held, Pieces.of([(0, "w", Box((0,), (8,)), 4)]))


def test_elements_of_two_sizes_are_an_error() -> None:
    with pytest.raises(ValueError, match="elements of 4 and of 2 bytes"):
        make_plan(Pieces.of([(0, "w", Box((0,), (4,)), 4)]), Pieces.of([(0, "w", Box((0,), (4,)), 2)]))
