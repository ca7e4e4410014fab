"""Who sends which part of which tensor to whom.

Pure arithmetic on tables: every rank computes the same plan, no process is needed to test it, and thousands of ranks
take seconds.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from copus.reshard.pieces import Pieces, merge_names

_FAIR = 1.1
"""What a rank may send because it is near, in means over all ranks; beyond that, others help."""


@dataclass(frozen=True)
class Plan:
    """Every needed part, from whom to whom: one row each, in an order that all ranks share.

    Where sender and receiver are the same, the row is a copy inside that rank.
    """

    held: Pieces
    needed: Pieces
    names: tuple[str, ...]
    """Global tensors, in the order of the rows."""
    sender: np.ndarray
    source: np.ndarray
    """Row in the table of what is held."""
    receiver: np.ndarray
    target: np.ndarray
    """Row in the table of what is needed."""
    name: np.ndarray
    start: np.ndarray
    """Of shape (rows, 2): first element along each axis of the global tensor."""
    stop: np.ndarray
    bytes: np.ndarray

    @property
    def moves(self) -> np.ndarray:
        """Which rows change rank."""
        return self.sender != self.receiver

    @property
    def bytes_moved(self) -> int:
        """Bytes that change rank: what each rank lacks, and nothing twice."""
        return int(self.bytes[self.moves].sum())

    def bytes_sent(self, ranks: int) -> np.ndarray:
        """By each rank, of shape (ranks,)."""
        moves = self.moves
        return _sum_by(self.sender[moves], self.bytes[moves], ranks)

    def most_peers(self) -> int:
        """The most ranks that any rank sends to, or receives from; 0 where nothing moves."""
        moves = self.moves
        if not moves.any():
            return 0
        pairs = np.unique(np.stack([self.sender[moves], self.receiver[moves]]), axis=1)
        return int(max(np.bincount(pairs[0]).max(), np.bincount(pairs[1]).max()))


def make_plan(held: Pieces, needed: Pieces, ranks_per_node: int | None = None) -> Plan:
    """Cover every needed piece of every rank from held pieces.

    What a rank holds itself is copied. Of several other holders, those on the receiver's node are asked first (ranks
    are numbered node by node; None: all on one), and among them the one that has the least to send; where that would
    make a rank send more than 1.1 times the mean, others help. Pieces of a tensor that different ranks hold must be the
    same box or disjoint. Raises ValueError where they are not, and where nobody holds a part that somebody needs.
    """
    names, element_bytes, (held_number, needed_number) = merge_names([held, needed])
    ranks = 1 + max(_highest(held.rank), _highest(needed.rank))
    have = _Boxes.of(held, held_number)
    want = _Boxes.of(needed, needed_number)
    _check_disjoint(have, names)

    source, target = _overlaps(have, want)
    start = np.maximum(have.start[source], want.start[target])
    stop = np.minimum(have.stop[source], want.stop[target])
    elements = (stop - start).prod(axis=1)
    covered = _sum_by(target, elements, len(want.name))
    _check_covered(covered, want, names)

    # one request for each overlap and each rank that needs it
    overlap, receiver, target_row = want.spread(target)
    have_box = source[overlap]
    size = elements[overlap] * element_bytes[have.name[have_box]]
    order = np.argsort(-size, kind="stable")  # the large first: what comes last evens out
    overlap, receiver, target_row, have_box, size = (
        each[order] for each in (overlap, receiver, target_row, have_box, size)
    )
    holder = _choose(have, have_box, receiver, size, ranks, ranks_per_node or ranks)
    sender = have.rank[holder]
    name = have.name[have_box]
    order = np.lexsort((receiver, sender, start[overlap, 1], start[overlap, 0], name))
    picked = overlap[order]
    return Plan(
        held,
        needed,
        names,
        sender[order],
        have.row[holder[order]],
        receiver[order],
        target_row[order],
        name[order],
        start[picked],
        stop[picked],
        size[order],
    )


@dataclass(frozen=True)
class _Boxes:
    """The different boxes of a table, and for each the ranks that have it: `rank[first[b] : first[b + 1]]`, sorted."""

    name: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    """In the table, for each entry of `rank`."""

    @classmethod
    def of(cls, pieces: Pieces, number: np.ndarray) -> "_Boxes":
        name = number[pieces.name]
        columns = (name, pieces.start[:, 0], pieces.start[:, 1], pieces.stop[:, 0], pieces.stop[:, 1])
        order = np.lexsort((pieces.rank, *columns[::-1]))
        new = np.ones(len(order), bool)
        new[1:] = np.any([each[order][1:] != each[order][:-1] for each in columns], axis=0)
        first = np.flatnonzero(new)
        unique = order[first]
        return cls(
            name[unique],
            pieces.start[unique],
            pieces.stop[unique],
            np.append(first, len(order)),
            pieces.rank[order],
            order,
        )

    def spread(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each of `boxes` and each rank that has it: index into `boxes`, rank, row in the table."""
        index, entry = _expand(self.first[boxes], self.first[boxes + 1])
        return index, self.rank[entry], self.row[entry]


def _overlaps(a: _Boxes, b: _Boxes) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of boxes of the same tensor that have elements in common.

    A sweep along the first axis: with the boxes of `b` in order of where they begin, those that can meet a box of `a`
    are neighbours, since none of a tensor is higher than its highest.
    """
    count = 1 + max(_highest(a.name), _highest(b.name))
    extent, reach = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for boxes in (a, b):
        np.maximum.at(extent, boxes.name, boxes.stop[:, 0])
    np.maximum.at(reach, b.name, b.stop[:, 0] - b.start[:, 0])
    base = np.cumsum(extent + reach) - extent  # one line for all tensors, none within reach of the next
    begin = base[b.name] + b.start[:, 0]
    order = np.argsort(begin, kind="stable")
    begin = begin[order]
    low = np.searchsorted(begin, base[a.name] + a.start[:, 0] - reach[a.name], side="right")
    high = np.searchsorted(begin, base[a.name] + a.stop[:, 0], side="left")
    first, entry = _expand(low, np.maximum(low, high))
    second = order[entry]
    meet = np.all((a.start[first] < b.stop[second]) & (b.start[second] < a.stop[first]), axis=1)
    return first[meet], second[meet]


def _choose(
    have: _Boxes, box: np.ndarray, receiver: np.ndarray, size: np.ndarray, ranks: int, ranks_per_node: int
) -> np.ndarray:
    """For each request (a box that is held, and a rank that needs some of it) the entry of `have.rank` that serves
    it."""
    owner = np.repeat(np.arange(len(have.name)), np.diff(have.first))
    of_rank = owner * ranks + have.rank  # sorted, since ranks are within each box
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
    group = open_requests[order]  # those with the same holders to choose from are neighbours, the largest first
    new = np.flatnonzero(np.diff(low[group], prepend=-1).astype(bool) | np.diff(high[group], prepend=-1).astype(bool))
    groups = np.split(group, new[1:]) if len(group) else []
    for requests in sorted(groups, key=lambda each: -int(size[each[0]])):
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
    """Let holders on other nodes serve some of what a rank would send beyond `_FAIR` times the mean. Changes
    `holder`."""
    limit = int(_FAIR * sent.mean())
    shared = requests[np.diff(have.first)[box[requests]] > 1]
    moved = True
    while moved:  # who helped may now have too much: every pass makes the loads more alike
        moved = False
        server = have.rank[holder[shared]]
        busy = shared[sent[server] > limit]
        for request in busy[np.lexsort((-size[busy], -sent[have.rank[holder[busy]]]))].tolist():
            server, amount = have.rank[holder[request]], size[request]
            if sent[server] <= limit:
                continue
            first, last = have.first[box[request]], have.first[box[request] + 1]
            entry = first + int(np.argmin(sent[have.rank[first:last]]))
            other = have.rank[entry]
            if sent[other] + amount < sent[server]:
                sent[server] -= amount
                sent[other] += amount
                holder[request] = entry
                moved = True


def _check_disjoint(have: _Boxes, names: tuple[str, ...]) -> None:
    first, second = _overlaps(have, have)
    wrong = np.flatnonzero(first != second)
    if len(wrong):
        raise ValueError(f"{names[have.name[first[wrong[0]]]]} is held in parts that overlap")


def _check_covered(covered: np.ndarray, want: _Boxes, names: tuple[str, ...]) -> None:
    wrong = np.flatnonzero(covered != (want.stop - want.start).prod(axis=1))
    if len(wrong):
        box = wrong[0]
        raise ValueError(
            f"nobody holds all of {names[want.name[box]]} {want.start[box].tolist()}…{want.stop[box].tolist()}, "
            f"which rank {want.rank[want.first[box]]} needs"
        )


def _expand(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For ranges low[i] … high[i] − 1: the i of each element, and the element."""
    count = high - low
    index = np.repeat(np.arange(len(low)), count)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(count) - count - low, count)


def _sum_by(index: np.ndarray, amount: np.ndarray, length: int) -> np.ndarray:
    total = np.zeros(length, np.int64)  # bincount would go through floats
    np.add.at(total, index, amount)
    return total


def _highest(index: np.ndarray) -> int:
    return int(index.max()) if len(index) else 0
