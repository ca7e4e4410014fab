"""The geometry and the plan of a move, without processes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copus.reshard.boxes import Box, boxes_of_range
from copus.reshard.plan import Plan, make_plan, owned_parts
from copus.reshard.table import Field, Row, ShardTable

SHAPE = (12, 6)
W = (Field("w", "float32", SHAPE),)


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


def _grid(rows: int, columns: int, copies: int) -> ShardTable:
    """A tensor cut into rows × columns, each cell on `copies` ranks."""
    height, width = SHAPE[0] // rows, SHAPE[1] // columns
    cells = [Box((r * height, c * width), (height, width)) for r, c in itertools.product(range(rows), range(columns))]
    return ShardTable.of((rank, W, cells[rank // copies]) for rank in range(len(cells) * copies))


def _ranges(shares: int, copies: int) -> ShardTable:
    """A tensor cut as a distributed optimizer does: ranges of it when flat, in up to three boxes each."""
    bounds = np.linspace(0, np.prod(SHAPE), shares + 1).astype(int).tolist()
    rows: list[Row] = []
    for share, (start, stop) in enumerate(itertools.pairwise(bounds)):
        for copy in range(copies):
            rows += [(share * copies + copy, W, box) for box in boxes_of_range(SHAPE, start, stop)]
    return ShardTable.of(rows)


TABLES = [_grid(1, 1, 12), _grid(2, 1, 6), _grid(1, 3, 4), _grid(2, 3, 2), _grid(4, 3, 1), _grid(12, 1, 1)]
TABLES += [_ranges(12, 1), _ranges(5, 2), _ranges(4, 3)]


def _count(table: ShardTable) -> np.ndarray:
    """How often each element is there."""
    seen = np.zeros(SHAPE, int)
    for (top, left), (bottom, right) in zip(*(edge.tolist() for edge in (table.start, table.stop)), strict=True):
        seen[top:bottom, left:right] += 1
    return seen


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(TABLES), st.sampled_from(TABLES), st.sampled_from([None, 1, 4]))
def test_every_rank_gets_all_that_it_needs_and_only_what_it_lacks(
    held: ShardTable, needed: ShardTable, ranks_per_node: int | None
) -> None:
    plan = make_plan(held, needed, ranks_per_node)
    floor = 0
    for rank in range(12):
        own, target = (_count(table.select(np.flatnonzero(table.rank == rank))) for table in (held, needed))
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


def _vector(name: str, size: int) -> tuple[Field, ...]:
    return (Field(name, "float32", (size,)),)


def _full(holders: range, receivers: range, tensors: int = 1) -> tuple[ShardTable, ShardTable]:
    whole = Box((0,), (8,))
    names = [_vector(f"w{index}", 8) for index in range(tensors)]
    return tuple(  # type: ignore[return-value]
        ShardTable.of((rank, name, whole) for rank in ranks for name in names) for ranks in (holders, receivers)
    )


def _sent(plan: Plan, ranks: int) -> list[int]:
    return plan.bytes_sent(ranks).tolist()


def test_several_holders_share_the_sending() -> None:
    assert _sent(make_plan(*_full(range(4), range(4, 12))), 12) == [64] * 4 + [0] * 8


def test_holders_share_where_each_tensor_has_one_receiver_only() -> None:
    """Sharing goes over tensors, not only over the receivers of one."""
    assert _sent(make_plan(*_full(range(4), range(4, 5), tensors=8)), 5) == [64] * 4 + [0]


def test_holders_on_the_same_node_are_preferred() -> None:
    held = ShardTable.of((rank, _vector("w", 8), Box((0,), (8,))) for rank in (0, 4))
    needed = ShardTable.of((rank, _vector("w", 8), Box((0,), (8,))) for rank in (1, 2, 5, 6))
    plan = make_plan(held, needed, ranks_per_node=4)
    assert sorted(zip(plan.sender.tolist(), plan.receiver.tolist(), strict=True)) == [(0, 1), (0, 2), (4, 5), (4, 6)]


def test_others_help_a_node_that_would_have_to_send_too_much() -> None:
    """Seven receivers sit beside one of two holders: it must not serve them all."""
    held = ShardTable.of((rank, _vector(f"w{tensor}", 8), Box((0,), (8,))) for rank in (0, 8) for tensor in range(16))
    needed = ShardTable.of(
        (rank, _vector(f"w{tensor}", 8), Box((0,), (8,))) for rank in range(1, 8) for tensor in range(16)
    )
    sent = _sent(make_plan(held, needed, ranks_per_node=8), 16)
    assert sent[0] == sent[8]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sets(st.integers(0, 7), min_size=1)), min_size=1, max_size=8),
    st.lists(st.integers(0, 15), min_size=1, max_size=6),
)
def test_nobody_who_sends_too_much_could_be_relieved(tensors: list[tuple[int, set[int]]], receivers: list[int]) -> None:
    """Tensors of any size, each held by some ranks of two nodes. Who helps first may need help afterwards."""
    rows = [(_vector(f"w{index}", size), Box((0,), (size,)), holders) for index, (size, holders) in enumerate(tensors)]
    held = ShardTable.of((rank, name, box) for name, box, holders in rows for rank in sorted(holders))
    needed = ShardTable.of((rank, name, box) for name, box, _ in rows for rank in sorted(set(receivers)))
    plan = make_plan(held, needed, ranks_per_node=4)
    ranks = 1 + max(*receivers, *(max(holders) for _, _, holders in rows))
    sent = plan.bytes_sent(ranks)
    for row in np.flatnonzero(plan.moves):
        name, sender = plan.groups[plan.group[row]], plan.sender[row]
        if sent[sender] > 1.1 * sent.mean():
            holders = next(holders for fields, _, holders in rows if fields == name)
            assert all(sent[other] + plan.bytes[row] >= sent[sender] for other in holders - {sender})


def test_what_nobody_holds_is_an_error() -> None:
    held = ShardTable.of([(0, _vector("w", 5), Box((0,), (4,)))])
    with pytest.raises(ValueError, match="no rank holds all of w"):
        make_plan(held, ShardTable.of([(0, _vector("w", 5), Box((0,), (5,)))]))
    with pytest.raises(ValueError, match="no rank holds all of v"):
        make_plan(held, ShardTable.of([(0, _vector("v", 4), Box((0,), (4,)))]))


def test_parts_that_overlap_are_an_error() -> None:
    """Else a hole and an overlap of one size could cancel out."""
    w = _vector("w", 8)
    held = ShardTable.of([(0, w, Box((0,), (4,))), (1, w, Box((2,), (4,)))])
    with pytest.raises(ValueError, match="overlap"):
        make_plan(held, ShardTable.of([(0, w, Box((0,), (8,)))]))


def test_another_type_or_shape_is_an_error() -> None:
    held = ShardTable.of([(0, _vector("w", 4), Box((0,), (4,)))])
    for other in (Field("w", "bfloat16", (4,)), Field("w", "float32", (5,))):
        with pytest.raises(ValueError, match=r"w: float32 of shape \[4\] is held, and "):
            make_plan(held, ShardTable.of([(0, (other,), Box((0,), (4,)))]))


def test_fields_travel_together_only_if_both_sides_cut_them_alike() -> None:
    """Weight and moment are whole on rank 0; rank 1 needs all of the weight, and two ranks half of the moment each."""
    weight, moment = Field("w", "bfloat16", (8,)), Field("w/exp_avg", "float32", (8,))
    held = ShardTable.of([(0, (weight, moment), Box((0,), (8,)))])
    rows: list[Row] = [(1, (weight,), Box((0,), (8,)))]
    rows += [(rank, (moment,), Box((4 * rank,), (4,))) for rank in (0, 1)]
    plan = make_plan(held, ShardTable.of(rows))
    moved = {
        (plan.groups[plan.group[row]], int(plan.receiver[row]), int(plan.bytes[row]))
        for row in np.flatnonzero(plan.moves)
    }
    assert moved == {((weight,), 1, 16), ((moment,), 1, 16)}


def test_numbers_and_tensors_of_many_axes_have_places_too() -> None:
    counter, cube = Field("steps", "int64", ()), Field("cube", "float32", (4, 6, 2))
    held = ShardTable.of(
        [(0, (counter,), Box((), ())), (0, (cube,), Box((0, 0, 0), (4, 3, 2))), (1, (cube,), Box((0, 3, 0), (4, 3, 2)))]
    )
    needed = ShardTable.of([(1, (counter,), Box((), ())), (1, (cube,), Box((1, 0, 1), (2, 6, 1)))])
    plan = make_plan(held, needed)
    assert plan.bytes_moved == 8 + 4 * (2 * 3 * 1)
    assert held.of_rank(0)["steps", ()][1] == Box((), ())


@given(st.sampled_from(TABLES))
def test_owners_have_everything_once(table: ShardTable) -> None:
    owned = owned_parts(table)
    assert (_count(owned) == 1).all()
    for rank in range(12):
        held = _count(table.select(np.flatnonzero(table.rank == rank)))
        assert (_count(owned.select(np.flatnonzero(owned.rank == rank))) <= held).all(), "nobody owns what it lacks"


def test_replicas_own_equal_shares() -> None:
    held, _ = _full(range(4), range(1), tensors=16)
    assert np.bincount(owned_parts(held).rank, weights=owned_parts(held).bytes).tolist() == [4 * 32] * 4
