"""Executes a plan on one rank: local copies, and messages to and from other ranks through bounded staging buffers."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from copus.reshard.plan import Plan
from copus.reshard.table import Place, ShardTable

ALONE = 64 * 2**10
"""Tensors of at least this many bytes are sent alone; for smaller ones a message costs more than a copy."""

LiveState = dict[Place, Callable[[], torch.Tensor]]
"""For every shard of this rank, a function that returns its tensor, a view of the live one. Statistics of an optimizer
without a step so far are created when the function is called."""


class Transfer(NamedTuple):
    """A part of a held shard that becomes part of a needed one, for all fields of a group."""

    group: int
    names: tuple[str, ...]
    source: tuple[int, ...]
    """Where the held shard begins."""
    target: tuple[int, ...]
    """Where the needed shard begins."""
    in_source: tuple[slice, ...]
    in_target: tuple[slice, ...]
    bytes: int


@torch.no_grad()
def reshard(
    plan: Plan,
    held: dict[Place, torch.Tensor],
    needed: Mapping[Place, Callable[[], torch.Tensor]],
    staging_bytes: int,
    device: torch.device,
) -> None:
    """Fill the `needed` tensors of all ranks from the `held` ones. Collective over the default group.

    Bit-exact: bytes are copied and nothing is computed. A shard is removed from `held` as soon as it has been read for
    the last time, and a needed tensor is created in the round in which its first bytes arrive. So the peak of memory
    stays below old + new + `staging_bytes`. Both sides must be as the plan's tables say (`misfit`).
    """
    rank = dist.get_rank()
    work = _Work(plan, rank, staging_bytes)
    uses = work.uses()
    for place in [place for place in held if not uses[place]]:
        del held[place]

    def take(transfer: Transfer) -> Iterator[torch.Tensor]:
        for name in transfer.names:
            place = name, transfer.source
            yield torch.atleast_1d(held[place][transfer.in_source])
            uses[place] -= 1
            if not uses[place]:
                del held[place]

    def give(transfer: Transfer) -> Iterator[torch.Tensor]:
        for name in transfer.names:
            yield torch.atleast_1d(needed[name, transfer.target]()[transfer.in_target])

    staging = _Staging(rank, device)
    copies = iter([*work.copies, None])
    copy = next(copies)
    for messages in [*work.rounds, None]:
        last = np.inf if messages is None else max(message.transfers[-1].group for message in messages)
        while copy is not None and copy.group <= last:
            for target, source in zip(give(copy), take(copy), strict=True):
                target.copy_(source)
            copy = next(copies)
        if messages is not None:
            staging.exchange(messages, take, give)


class Message(NamedTuple):
    """The transfers from one rank to another in one round."""

    sender: int
    receiver: int
    transfers: list[Transfer]

    @property
    def bytes(self) -> int:
        """Its size."""
        return sum(transfer.bytes for transfer in self.transfers)


class _Work:
    """One rank's part of a plan.

    A round has at most one message to and one from every peer, and all of them fit into the staging bytes. Sender and
    receiver cut their common list of transfers alike, because sizes depend on the plan alone.
    """

    def __init__(self, plan: Plan, rank: int, staging_bytes: int) -> None:
        limit = max(1, staging_bytes // max(1, 2 * plan.most_peers()))
        self.copies: list[Transfer] = []
        channels: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        for row in np.flatnonzero((plan.sender == rank) | (plan.receiver == rank)):
            sender, receiver = int(plan.sender[row]), int(plan.receiver[row])
            group = int(plan.group[row])
            axes = len(plan.groups[group][0].shape)
            names = tuple(field.name for field in plan.groups[group])
            source = plan.held.start[plan.source[row], :axes]
            target = plan.needed.start[plan.target[row], :axes]
            box = np.stack([plan.start[row, :axes], plan.stop[row, :axes]])
            size = int(plan.bytes[row])
            for part in split_box(box, size, limit if sender != receiver else size):
                transfer = Transfer(
                    group,
                    names,
                    tuple(source.tolist()),
                    tuple(target.tolist()),
                    _slices(part - source),
                    _slices(part - target),
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
        """How often a held shard is read, by place."""
        sent = (message for messages in self.rounds for message in messages if message.sender == self._rank)
        read = [transfer for message in sent for transfer in message.transfers] + self.copies
        return Counter((name, transfer.source) for transfer in read for name in transfer.names)


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


def split_box(box: np.ndarray, size: int, limit: int) -> Iterator[np.ndarray]:
    """Cut a box of `size` bytes ([start, stop], of shape (2, axes)) in halves until every part fits into `limit`, or is
    one element: along the first axis that can be cut, so that parts of whole rows stay in one piece of memory."""
    if size <= limit or _elements(box) == 1:
        yield box
        return
    axis = int(np.flatnonzero(box[1] - box[0] > 1)[0])
    first, second = box.copy(), box.copy()
    first[1, axis] = second[0, axis] = box[:, axis].sum() // 2
    for half in (first, second):
        yield from split_box(half, size * _elements(half) // _elements(box), limit)


def _elements(box: np.ndarray) -> int:
    return int((box[1] - box[0]).prod())


def _slices(box: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box.T.tolist())


class _Staging:
    """A buffer for small and for non-contiguous tensors, as large as the largest round needs."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def exchange(
        self,
        messages: list[Message],
        take: Callable[[Transfer], Iterator[torch.Tensor]],
        give: Callable[[Transfer], Iterator[torch.Tensor]],
    ) -> None:
        """Send and receive one round, as bytes, so that different types can share a message.

        A large tensor is a message of its own. An end that has it contiguous sends or receives it in place.
        """
        parcels = []
        for message in messages:
            sends = message.sender == self._rank
            fields = [field for transfer in message.transfers for field in (take if sends else give)(transfer)]
            peer = message.receiver if sends else message.sender
            parcels += [_Parcel(sends, peer, tag, parts, self._device) for tag, parts in enumerate(_shared(fields))]
        staged = sum(parcel.bytes for parcel in parcels if not parcel.in_place)
        if staged > len(self._buffer):
            self._buffer = torch.empty(0)  # free the old one before allocating a larger one
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
    """Tensors that are sent to, or received from, one peer together. What lies on the host goes through the buffer on
    the device that communicates."""

    def __init__(self, sends: bool, peer: int, tag: int, parts: list[torch.Tensor], device: torch.device) -> None:
        self.in_place = len(parts) == 1 and parts[0].is_contiguous() and parts[0].device.type == device.type
        self.bytes = sum(_size(part) for part in parts)
        self.buffer = parts[0].view(-1).view(torch.uint8) if self.in_place else None
        self._sends, self._peer, self._tag, self._parts = sends, peer, tag, parts

    def operation(self) -> dist.P2POp:
        """The operation that sends or receives it; tensors to be sent are packed first."""
        assert self.buffer is not None
        if self._sends:
            for part, packed in self._staged():
                packed.copy_(part)
        return dist.P2POp(dist.isend if self._sends else dist.irecv, self.buffer, self._peer, tag=self._tag)

    def unpack(self) -> None:
        """Copy received bytes to their tensors."""
        if not self._sends:
            for part, packed in self._staged():
                part.copy_(packed)

    def _staged(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The tensors and their places in the buffer, as bytes."""
        if self.in_place:
            return
        assert self.buffer is not None
        rest = self.buffer
        for part in self._parts:
            there = part.view(torch.uint8)  # rows are contiguous
            yield there, rest[: there.numel()].view(there.shape)
            rest = rest[there.numel() :]


def _shared(fields: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors of a message, grouped as both ends send them: large ones alone, small ones together."""
    small = [field for field in fields if _size(field) < ALONE]
    yield from ([field] for field in fields if _size(field) >= ALONE)
    if small:
        yield small


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def misfit(side: str, table: ShardTable, rank: int, live: Collection[Place]) -> str | None:
    """The first difference between the live shards of a rank and its rows of a table, in words; None if there is
    none."""
    differences = sorted(table.of_rank(rank).keys() ^ set(live))
    if not differences:
        return None
    name, start = differences[0]
    return f"the state {side} on rank {rank} is not as planned: {name} from {list(start)} on"
