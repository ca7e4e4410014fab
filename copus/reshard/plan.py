"""Plans a move: which rank sends which part of which tensor to which other rank.

Pure arithmetic on tables: every rank computes the same plan, tests need no processes, and thousands of ranks take
seconds.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from copus.reshard.boxes import Box
from copus.reshard.table import Field, ShardTable

_FAIR = 1.1
"""The most that a rank sends for being near, in multiples of the mean over all ranks; other ranks send the rest."""


@dataclass(frozen=True)
class Plan:
    """Every part that a rank needs and the rank that it comes from: a row per part, in the same order on all ranks.

    If sender and receiver are the same, the row is a local copy.
    """

    held: ShardTable
    needed: ShardTable
    groups: tuple[tuple[Field, ...], ...]
    """Fields that are sent together because both tables cut them alike; in the order of the rows."""
    sender: np.ndarray
    source: np.ndarray
    """Row of the held table."""
    receiver: np.ndarray
    target: np.ndarray
    """Row of the needed table."""
    group: np.ndarray
    start: np.ndarray
    """Of shape (rows, axes): first element along each axis of the whole tensor."""
    stop: np.ndarray
    bytes: np.ndarray
    """All fields of the group together."""

    @property
    def moves(self) -> np.ndarray:
        """The rows whose part changes rank."""
        return self.sender != self.receiver

    @property
    def bytes_moved(self) -> int:
        """Bytes that change rank: those that ranks lack, and none twice."""
        return int(self.bytes[self.moves].sum())

    def bytes_sent(self, ranks: int) -> np.ndarray:
        """Bytes sent, by rank; of shape (ranks,)."""
        moves = self.moves
        return _sum_by(self.sender[moves], self.bytes[moves], ranks)

    def most_peers(self) -> int:
        """The most ranks that any rank sends to, or receives from; 0 if nothing moves."""
        moves = self.moves
        if not moves.any():
            return 0
        pairs = np.unique(np.stack([self.sender[moves], self.receiver[moves]]), axis=1)
        return int(max(np.bincount(pairs[0]).max(), np.bincount(pairs[1]).max()))

    def select(self, rows: np.ndarray) -> "Plan":
        """Some rows of the plan, in order."""
        columns = (self.sender, self.source, self.receiver, self.target, self.group, self.start, self.stop, self.bytes)
        return Plan(self.held, self.needed, self.groups, *(column[rows] for column in columns))


def make_plan(held: ShardTable, needed: ShardTable, ranks_per_node: int | None = None) -> Plan:
    """Cover every needed part of every rank from parts that ranks hold.

    A part that the rank holds itself is copied. Among several other holders, those on the receiver's node come first
    (ranks are numbered node by node; None: all on one node), then the one with the least to send. If a rank would send
    more than 1.1 times the mean, holders on other nodes take some of it. The parts of a tensor that different ranks
    hold must be the same box or disjoint. Raises ValueError if they are not, or if no rank holds a part that is needed.
    """
    groups, (held_group, needed_group) = _common_groups(held, needed)
    element_bytes = np.array([sum(field.element_bytes for field in fields) for fields in groups], np.int64)
    ranks = 1 + max(_highest(held.rank), _highest(needed.rank))
    axes = max(held.start.shape[1], needed.start.shape[1])
    have = _Boxes.of(held, held_group, axes)
    want = _Boxes.of(needed, needed_group, axes)
    _check_disjoint(have, groups)

    source, target = _overlaps(have, want)
    start = np.maximum(have.start[source], want.start[target])
    stop = np.minimum(have.stop[source], want.stop[target])
    elements = (stop - start).prod(axis=1)
    _check_covered(_sum_by(target, elements, len(want.group)), want, groups)

    # a request per overlap and rank that needs it
    overlap, receiver, target_row = want.spread(target)
    have_box = source[overlap]
    size = elements[overlap] * element_bytes[have.group[have_box]]
    order = np.argsort(-size, kind="stable")  # the largest first: the small ones even the loads out
    overlap, receiver, target_row, have_box, size = (
        column[order] for column in (overlap, receiver, target_row, have_box, size)
    )
    holder = _choose(have, have_box, receiver, size, ranks, ranks_per_node or ranks)
    sender = have.rank[holder]
    group = have.group[have_box]
    order = np.lexsort((receiver, sender, *start[overlap].T[::-1], group))
    picked = overlap[order]
    return Plan(
        held,
        needed,
        groups,
        sender[order],
        have.row[holder[order]],
        receiver[order],
        target_row[order],
        group[order],
        start[picked],
        stop[picked],
        size[order],
    )


def owned_parts(table: ShardTable) -> ShardTable:
    """An owner for every part of the state: all of it once, spread evenly over the ranks that hold it.

    Owners write checkpoints, and read them for the others. Computed as the plan of a move to an additional rank, which
    holds nothing and needs everything. Raises ValueError if no rank holds some part.
    """
    outside = 1 + _highest(table.rank)
    plan = make_plan(table, ShardTable.of((outside, fields, Box.whole(fields[0].shape)) for fields in table.groups))
    return ShardTable(plan.groups, plan.sender, plan.group, plan.start, plan.stop)


def _common_groups(
    held: ShardTable, needed: ShardTable
) -> tuple[tuple[tuple[Field, ...], ...], tuple[list[list[int]], list[list[int]]]]:
    """The coarsest groups of fields that both tables cut alike; and which of these a table's own groups consist of.

    Raises ValueError if the tables do not agree on the type or the shape of a field.
    """
    in_held = {field.name: (number, field) for number, fields in enumerate(held.groups) for field in fields}
    in_needed = {field.name: (number, field) for number, fields in enumerate(needed.groups) for field in fields}
    together: dict[tuple[int, int], list[Field]] = {}
    for name, (number, field) in in_held.items():
        other, needed_field = in_needed.get(name, (-1, field))
        if needed_field != field:
            raise ValueError(f"{name}: {_described(field)} is held, and {_described(needed_field)} needed")
        together.setdefault((number, other), []).append(field)
    for name, (number, field) in in_needed.items():
        if name not in in_held:
            together.setdefault((-1, number), []).append(field)
    parts: tuple[list[list[int]], list[list[int]]] = ([[] for _ in held.groups], [[] for _ in needed.groups])
    for index, pair in enumerate(together):
        for side, number in enumerate(pair):
            if number >= 0:
                parts[side][number].append(index)
    return tuple(tuple(fields) for fields in together.values()), parts


def _described(field: Field) -> str:
    return f"{field.dtype} of shape {list(field.shape)}"


@dataclass(frozen=True)
class _Boxes:
    """The distinct boxes of a table. Those ranks have box b: `rank[first[b] : first[b + 1]]`, sorted."""

    group: np.ndarray
    """Index into the plan's groups."""
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    """Row of the table, for every entry of `rank`."""

    @classmethod
    def of(cls, table: ShardTable, groups: list[list[int]], axes: int) -> "_Boxes":
        """`groups` lists the groups of the plan that a group of the table is divided into."""
        count = np.array([len(parts) for parts in groups], np.int64)
        flat = np.array([part for parts in groups for part in parts], np.int64)
        begin = np.cumsum(count) - count
        row, entry = _expand(begin[table.group], begin[table.group] + count[table.group])
        group, rank = flat[entry], table.rank[row]
        padding = ((0, 0), (0, axes - table.start.shape[1]))
        start, stop = np.pad(table.start, padding)[row], np.pad(table.stop, padding, constant_values=1)[row]
        columns = (group, *start.T, *stop.T)
        order = np.lexsort((rank, *columns[::-1]))
        new = np.ones(len(order), bool)
        new[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
        first = np.flatnonzero(new)
        unique = order[first]
        return cls(group[unique], start[unique], stop[unique], np.append(first, len(order)), rank[order], row[order])

    def spread(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An entry per box and rank that has it: index into `boxes`, rank, row of the table."""
        index, entry = _expand(self.first[boxes], self.first[boxes + 1])
        return index, self.rank[entry], self.row[entry]


def _overlaps(a: _Boxes, b: _Boxes) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of boxes of the same tensor that have elements in common.

    A sweep along the first axis: sorted by their beginning, the boxes of `b` that can meet a box of `a` are neighbours,
    because no box of a tensor is higher than its highest one.
    """
    count = 1 + max(_highest(a.group), _highest(b.group))
    extent, reach = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for boxes in (a, b):
        np.maximum.at(extent, boxes.group, boxes.stop[:, 0])
    np.maximum.at(reach, b.group, b.stop[:, 0] - b.start[:, 0])
    base = np.cumsum(extent + reach) - extent  # one line for all tensors, none within reach of the next
    begin = base[b.group] + b.start[:, 0]
    order = np.argsort(begin, kind="stable")
    begin = begin[order]
    low = np.searchsorted(begin, base[a.group] + a.start[:, 0] - reach[a.group], side="right")
    high = np.searchsorted(begin, base[a.group] + a.stop[:, 0], side="left")
    first, entry = _expand(low, np.maximum(low, high))
    second = order[entry]
    meet = np.all((a.start[first] < b.stop[second]) & (b.start[second] < a.stop[first]), axis=1)
    return first[meet], second[meet]


def _choose(
    have: _Boxes, box: np.ndarray, receiver: np.ndarray, size: np.ndarray, ranks: int, ranks_per_node: int
) -> np.ndarray:
    """The entry of `have.rank` that serves a request, for all requests. A request is a held box and a rank that needs
    some of it."""
    owner = np.repeat(np.arange(len(have.group)), np.diff(have.first))
    of_rank = owner * ranks + have.rank  # sorted, because ranks are sorted within a box
    own = np.searchsorted(of_rank, box * ranks + receiver)
    holder = np.where(own < len(of_rank), own, 0)
    lacks = of_rank[holder] != box * ranks + receiver

    nodes = -(-ranks // ranks_per_node)
    of_node = owner * nodes + have.rank // ranks_per_node
    wanted = box * nodes + receiver // ranks_per_node
    low, high = np.searchsorted(of_node, wanted, "left"), np.searchsorted(of_node, wanted, "right")
    remote = low == high
    low, high = np.where(remote, have.first[box], low), np.where(remote, have.first[box + 1], high)

    only = lacks & (high - low == 1)
    holder[only] = low[only]
    sent = _sum_by(have.rank[holder[only]], size[only], ranks).tolist()
    rank_of = have.rank.tolist()
    open_requests = np.flatnonzero(lacks & ~only)
    order = np.lexsort((high[open_requests], low[open_requests]))
    group = open_requests[order]  # requests with the same possible holders are neighbours, the largest first
    new = np.flatnonzero(np.diff(low[group], prepend=-1).astype(bool) | np.diff(high[group], prepend=-1).astype(bool))
    groups = np.split(group, new[1:]) if len(group) else []
    for requests in sorted(groups, key=lambda requests: -int(size[requests[0]])):
        heap = [(sent[rank_of[entry]], entry) for entry in range(low[requests[0]], high[requests[0]])]
        heapq.heapify(heap)
        for request, amount in zip(requests.tolist(), size[requests].tolist(), strict=True):
            load, entry = heap[0]
            holder[request] = entry
            heapq.heapreplace(heap, (load + amount, entry))
        for load, entry in heap:
            sent[rank_of[entry]] = load
    _relieve(have, box, size, holder, np.array(sent), np.flatnonzero(lacks))
    return holder


def _relieve(
    have: _Boxes, box: np.ndarray, size: np.ndarray, holder: np.ndarray, sent: np.ndarray, requests: np.ndarray
) -> None:
    """Let holders on other nodes serve requests of ranks that would send more than `_FAIR` times the mean. Changes
    `holder` in place."""
    limit = int(_FAIR * sent.mean())
    shared = requests[np.diff(have.first)[box[requests]] > 1]
    rank_of, first, loads = have.rank.tolist(), have.first.tolist(), sent.tolist()
    moved = True
    while moved:  # a helper may now have too much; every pass makes the loads more alike
        moved = False
        load = np.array(loads)[have.rank[holder[shared]]]
        busy = shared[load > limit]
        order = np.lexsort((-size[busy], -load[load > limit]))
        columns = (busy, box[busy], size[busy], holder[busy])
        for request, boxed, amount, entry in zip(*(column[order].tolist() for column in columns), strict=True):
            server = rank_of[entry]
            if loads[server] <= limit:
                continue
            helper = min(range(first[boxed], first[boxed + 1]), key=lambda entry: loads[rank_of[entry]])
            other = rank_of[helper]
            if loads[other] + amount < loads[server]:
                loads[server] -= amount
                loads[other] += amount
                holder[request] = helper
                moved = True


def _check_disjoint(have: _Boxes, groups: tuple[tuple[Field, ...], ...]) -> None:
    first, second = _overlaps(have, have)
    wrong = np.flatnonzero(first != second)
    if len(wrong):
        raise ValueError(f"{groups[have.group[first[wrong[0]]]][0].name} is held in parts that overlap")


def _check_covered(covered: np.ndarray, want: _Boxes, groups: tuple[tuple[Field, ...], ...]) -> None:
    wrong = np.flatnonzero(covered != (want.stop - want.start).prod(axis=1))
    if len(wrong):
        box = wrong[0]
        name, part = groups[want.group[box]][0].name, f"{want.start[box].tolist()}…{want.stop[box].tolist()}"
        raise ValueError(f"no rank holds all of {name} {part}, which rank {want.rank[want.first[box]]} needs")


def _expand(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All elements of the ranges low[i] … high[i] − 1: the i of the range, and the element."""
    count = high - low
    index = np.repeat(np.arange(len(low)), count)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(count) - count - low, count)


def _sum_by(index: np.ndarray, amount: np.ndarray, length: int) -> np.ndarray:
    total = np.zeros(length, np.int64)  # bincount would go through floats
    np.add.at(total, index, amount)
    return total


def _highest(index: np.ndarray) -> int:
    return int(index.max()) if len(index) else 0
