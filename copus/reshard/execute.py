"""Carries a plan out on one rank: copies inside it, and messages to and from others through bounded staging buffers."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from copus.reshard.boxes import Box
from copus.reshard.pieces import Pieces
from copus.reshard.plan import Plan

Place = tuple[str, tuple[int, int]]
"""Where a piece of this rank begins: global tensor, and position padded to two axes."""
Fields = list[torch.Tensor]
"""The tensors of a piece, all of its shape: one, or those that a name stands for together."""
ALONE = 64 * 2**10
"""Bytes from which on a tensor is a message of its own: below, a message costs more than a copy."""


def place_of(name: str, box: Box) -> Place:
    """The place of a piece."""
    first, second = (*box.offset, 0)[:2]
    return name, (first, second)


class Transfer(NamedTuple):
    """Part of one piece that becomes part of another."""

    name: int
    source: Place
    target: Place
    in_source: tuple[slice, slice]
    in_target: tuple[slice, slice]
    bytes: int


@torch.no_grad()
def reshard(
    plan: Plan,
    held: dict[Place, Fields],
    needed: Mapping[Place, Callable[[], Fields]],
    staging_bytes: int,
    device: torch.device,
) -> None:
    """Fill what `needed` gives from what all ranks hold in `held`. Collective over the default group.

    Bit-exact: bytes are copied and nothing is computed. `held` is emptied on the way, each piece as soon as nobody
    wants more of it, and what `needed` makes is asked for in the round in which its first bytes come: with that, the
    most memory in use stays below old + new + `staging_bytes`. Raises ValueError on every rank, before anything is
    touched, where the plan does not describe what is there.
    """
    rank = dist.get_rank()
    work = _Work(plan, rank, staging_bytes)
    _agree(_misfit(plan, held, needed, rank), device)
    uses = work.uses()
    for place in [place for place in held if not uses[place]]:
        del held[place]

    def take(transfer: Transfer) -> Iterator[torch.Tensor]:
        for field in held[transfer.source]:
            yield _part(field, transfer.in_source)
        uses[transfer.source] -= 1
        if not uses[transfer.source]:
            del held[transfer.source]

    def give(transfer: Transfer) -> Iterator[torch.Tensor]:
        for field in needed[transfer.target]():
            yield _part(field, transfer.in_target)

    staging = _Staging(rank, device)
    copies = iter([*work.copies, None])
    copy = next(copies)
    for messages in [*work.rounds, None]:
        last = np.inf if messages is None else max(message.transfers[-1].name for message in messages)
        while copy is not None and copy.name <= last:
            for target, source in zip(give(copy), take(copy), strict=True):
                target.copy_(source)
            copy = next(copies)
        if messages is not None:
            staging.exchange(messages, take, give)


class Message(NamedTuple):
    """What one rank sends to another at once."""

    sender: int
    receiver: int
    transfers: list[Transfer]

    @property
    def bytes(self) -> int:
        """Its size."""
        return sum(transfer.bytes for transfer in self.transfers)


class _Work:
    """What one rank does of a plan.

    In each round there is at most one message to and one from every peer, and all of them fit into the staging bytes.
    Both ends cut their common list of transfers the same way, since sizes depend on the plan alone.
    """

    def __init__(self, plan: Plan, rank: int, staging_bytes: int) -> None:
        limit = max(1, staging_bytes // max(1, 2 * plan.most_peers()))
        self.copies: list[Transfer] = []
        channels: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        for row in np.flatnonzero((plan.sender == rank) | (plan.receiver == rank)):
            sender, receiver = int(plan.sender[row]), int(plan.receiver[row])
            source, target = plan.source[row], plan.target[row]
            origins = plan.held.start[source], plan.needed.start[target]
            name = plan.names[plan.name[row]]
            places = [(name, (int(origin[0]), int(origin[1]))) for origin in origins]
            box = np.stack([plan.start[row], plan.stop[row]])
            size = int(plan.bytes[row])
            for part in _split(box, size, limit if sender != receiver else size):
                transfer = Transfer(
                    int(plan.name[row]),
                    places[0],
                    places[1],
                    _slices(part - origins[0]),
                    _slices(part - origins[1]),
                    size * _elements(part) // _elements(box),
                )
                if sender == receiver:
                    self.copies.append(transfer)
                else:
                    channels[sender, receiver].append(transfer)
        queues = [
            [Message(*channel, transfers) for transfers in _messages(all_transfers, limit)]
            for channel, all_transfers in sorted(channels.items())
        ]
        self.rounds = [[message for message in messages if message is not None] for messages in zip_longest(*queues)]
        self._rank = rank

    def uses(self) -> Counter[Place]:
        """How often each held piece is read."""
        sent = (message for messages in self.rounds for message in messages if message.sender == self._rank)
        read = [transfer.source for message in sent for transfer in message.transfers]
        return Counter(read + [copy.source for copy in self.copies])


def _messages(transfers: list[Transfer], limit: int) -> list[list[Transfer]]:
    messages: list[list[Transfer]] = [[]]
    size = 0
    for transfer in transfers:
        if messages[-1] and size + transfer.bytes > limit:
            messages.append([])
            size = 0
        messages[-1].append(transfer)
        size += transfer.bytes
    return messages


def _split(box: np.ndarray, size: int, limit: int) -> Iterator[np.ndarray]:
    """Cut a box of `size` bytes ([start, stop], of shape (2, 2)) in halves until every part fits, or is one element:
    between rows while there are several, so that parts of whole rows stay in one piece."""
    shape = box[1] - box[0]
    if size <= limit or _elements(box) == 1:
        yield box
        return
    axis = 0 if shape[0] > 1 else 1
    first, second = box.copy(), box.copy()
    first[1, axis] = second[0, axis] = box[0, axis] + shape[axis] // 2
    for half in (first, second):
        yield from _split(half, size * _elements(half) // _elements(box), limit)


def _elements(box: np.ndarray) -> int:
    return int((box[1] - box[0]).prod())


def _slices(box: np.ndarray) -> tuple[slice, slice]:
    (low, left), (high, right) = box.tolist()
    return slice(low, high), slice(left, right)


def _part(tensor: torch.Tensor, slices: tuple[slice, slice]) -> torch.Tensor:
    return tensor[slices[: tensor.dim()]]


class _Staging:
    """A buffer for what does not lie in one piece, or is small; as large as the largest round needs."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def exchange(
        self,
        messages: list[Message],
        take: Callable[[Transfer], Iterator[torch.Tensor]],
        give: Callable[[Transfer], Iterator[torch.Tensor]],
    ) -> None:
        """One round: send and receive, as bytes, so that any mix of types shares a message.

        A large tensor is a message of its own, which leaves from where it lies and arrives where it belongs, at either
        end that has it in one piece.
        """
        parcels = []
        for message in messages:
            sends = message.sender == self._rank
            fields = [field for each in message.transfers for field in (take if sends else give)(each)]
            peer = message.receiver if sends else message.sender
            parcels += [_Parcel(sends, peer, tag, parts) for tag, parts in enumerate(_shared(fields))]
        staged = sum(parcel.bytes for parcel in parcels if not parcel.in_place)
        if staged > len(self._buffer):
            self._buffer = torch.empty(0)  # the old one goes before a larger one comes
            self._buffer = torch.empty(staged, dtype=torch.uint8, device=self._device)
        free, operations = self._buffer, []
        for parcel in parcels:
            if not parcel.in_place:
                parcel.buffer, free = free[: parcel.bytes], free[parcel.bytes :]
            operations.append(parcel.operation())
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        for parcel in parcels:
            parcel.unpack()


class _Parcel:
    """Tensors that go to, or come from, one peer at once."""

    def __init__(self, sends: bool, peer: int, tag: int, parts: Fields) -> None:
        self.in_place = len(parts) == 1 and parts[0].is_contiguous()
        self.bytes = sum(_size(part) for part in parts)
        self.buffer = parts[0].view(-1).view(torch.uint8) if self.in_place else None
        self._sends, self._peer, self._tag, self._parts = sends, peer, tag, parts

    def operation(self) -> dist.P2POp:
        """What sends or receives it, packed before."""
        assert self.buffer is not None
        if self._sends:
            for part, packed in self._staged():
                packed.copy_(part)
        return dist.P2POp(dist.isend if self._sends else dist.irecv, self.buffer, self._peer, tag=self._tag)

    def unpack(self) -> None:
        """Put what has come where it belongs."""
        if not self._sends:
            for part, packed in self._staged():
                part.copy_(packed)

    def _staged(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each tensor and its place in the buffer, as bytes."""
        if self.in_place:
            return
        assert self.buffer is not None
        rest = self.buffer
        for part in self._parts:
            there = part.view(torch.uint8)  # rows are contiguous
            yield there, rest[: there.numel()].view(there.shape)
            rest = rest[there.numel() :]


def _shared(fields: Fields) -> Iterator[Fields]:
    """The tensors of a message as both ends send them: the large ones alone, the small ones together."""
    small = [field for field in fields if _size(field) < ALONE]
    yield from ([field] for field in fields if _size(field) >= ALONE)
    if small:
        yield small


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _misfit(
    plan: Plan, held: Mapping[Place, Fields], needed: Mapping[Place, Callable[[], Fields]], rank: int
) -> str | None:
    """What the plan says of this rank and is not so."""
    told, wanted = _shapes(plan.held, rank), _shapes(plan.needed, rank)
    for what, planned, there in (("held", told, held.keys()), ("needed", wanted, needed.keys())):
        if planned.keys() != there:
            return f"{what} on rank {rank}, but not as planned: {sorted(planned.keys() ^ there)[0]}"
    for place, fields in held.items():
        for field in fields:
            if (*field.shape, 1)[:2] != told[place]:
                return f"held on rank {rank}, but not as planned: {place} has shape {list(field.shape)}"
    return None


def _shapes(table: Pieces, rank: int) -> dict[Place, tuple[int, int]]:
    own = table.of_rank(rank)
    return {
        (table.names[name], (row, column)): (bottom - row, right - column)
        for name, (row, column), (bottom, right) in zip(
            own.name.tolist(), own.start.tolist(), own.stop.tolist(), strict=True
        )
    }


def _agree(problem: str | None, device: torch.device) -> None:
    """Raise on every rank where any has a problem."""
    vote = torch.tensor([int(problem is not None)], device=device)
    dist.all_reduce(vote)
    if vote.item():
        raise ValueError(problem or f"{int(vote.item())} other ranks do not hold what was planned")
