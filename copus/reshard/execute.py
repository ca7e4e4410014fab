"""Carries a plan out: copies inside a rank, and messages between ranks through bounded staging buffers."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist

from copus.reshard.boxes import Box
from copus.reshard.plan import Piece, Plan, Transfer, make_plan

STAGING_BYTES = 256 * 2**20

Held = tuple[Piece, torch.Tensor]
"""A piece, and the tensor (of the piece's shape, any strides) that holds it."""


@torch.no_grad()
def reshard(held: Sequence[Held], needed: Sequence[Held], staging_bytes: int = STAGING_BYTES) -> int:
    """Fill the tensors in `needed` from what all ranks hold in `held`. Collective over the default group. Bytes moved,
    of all ranks.

    Bit-exact: elements are copied and never computed with. Raises ValueError on every rank where something is held by
    nobody.
    """
    everywhere: list[tuple[list[Piece], list[Piece]]] = [([], [])] * dist.get_world_size()
    dist.all_gather_object(everywhere, ([piece for piece, _ in held], [piece for piece, _ in needed]))
    plan = make_plan([rank[0] for rank in everywhere], [rank[1] for rank in everywhere])
    rank = dist.get_rank()
    for copy in plan.copies:
        if copy.receiver == rank:
            _part(needed[copy.target], copy.box).copy_(_part(held[copy.source], copy.box))
    for messages in _rounds(plan, rank, staging_bytes):
        _exchange(messages, held, needed, rank)
    return plan.bytes_moved


def _part(holder: Held, box: Box) -> torch.Tensor:
    piece, tensor = holder
    return tensor[box.slices_in(piece.box)]


def _rounds(plan: Plan, rank: int, staging_bytes: int) -> list[list[list[Transfer]]]:
    """Messages by round: in each, at most one message to and one from every peer, all of them within the staging bytes.

    Both ends cut their common list of transfers the same way, since the size of a message depends on the plan alone. A
    single transfer larger than a message goes alone.
    """
    channels: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for transfer in plan.transfers:
        channels[transfer.sender, transfer.receiver].append(transfer)
    limit = staging_bytes // max(1, 2 * _busiest(channels))
    queues: list[list[list[Transfer]]] = []
    for (sender, receiver), transfers in channels.items():
        if rank in (sender, receiver):
            queues.append(_messages(transfers, limit))
    return [[message for message in messages if message] for messages in zip_longest(*queues, fillvalue=[])]


def _busiest(channels: dict[tuple[int, int], list[Transfer]]) -> int:
    """Most peers that any rank sends to or receives from."""
    peers: dict[tuple[str, int], int] = defaultdict(int)
    for sender, receiver in channels:
        peers["send", sender] += 1
        peers["receive", receiver] += 1
    return max(peers.values(), default=1)


def _messages(transfers: list[Transfer], limit: int) -> list[list[Transfer]]:
    messages: list[list[Transfer]] = [[]]
    size = 0
    for transfer in transfers:
        for part in _split(transfer, limit):
            if messages[-1] and size + part.bytes > limit:
                messages.append([])
                size = 0
            messages[-1].append(part)
            size += part.bytes
    return messages


def _split(transfer: Transfer, limit: int) -> list[Transfer]:
    """Cut a transfer along its longest axis until every part fits."""
    if transfer.bytes <= limit or transfer.box.elements == 1:
        return [transfer]
    axis = max(range(len(transfer.box.shape)), key=lambda each: transfer.box.shape[each])
    half = transfer.box.shape[axis] // 2
    offset, shape = transfer.box.offset, transfer.box.shape
    first = Box(offset, (*shape[:axis], half, *shape[axis + 1 :]))
    second = Box(
        (*offset[:axis], offset[axis] + half, *offset[axis + 1 :]),
        (*shape[:axis], shape[axis] - half, *shape[axis + 1 :]),
    )
    element_bytes = transfer.bytes // transfer.box.elements
    parts = []
    for box in (first, second):
        part = Transfer(
            transfer.key,
            box,
            transfer.sender,
            transfer.source,
            transfer.receiver,
            transfer.target,
            box.elements * element_bytes,
        )
        parts += _split(part, limit)
    return parts


def _exchange(messages: list[list[Transfer]], held: Sequence[Held], needed: Sequence[Held], rank: int) -> None:
    """One round: pack, send and receive, unpack. Bytes, so that any mix of types shares a message."""
    operations, incoming, outgoing = [], [], []
    for message in messages:
        first = message[0]
        if first.sender == rank:
            packed = torch.cat([_as_bytes(_part(held[each.source], each.box)) for each in message])
            outgoing.append(packed)  # alive until sent
            operations.append(dist.P2POp(dist.isend, packed, first.receiver))
        else:
            device = needed[first.target][1].device
            buffer = torch.empty(sum(each.bytes for each in message), dtype=torch.uint8, device=device)
            incoming.append((message, buffer))
            operations.append(dist.P2POp(dist.irecv, buffer, first.sender))
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    for message, buffer in incoming:
        start = 0
        for each in message:
            target = _part(needed[each.target], each.box)
            target.copy_(buffer[start : start + each.bytes].clone().view(target.dtype).view(target.shape))
            start += each.bytes


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
