"""Who sends which part of which tensor to whom. Pure arithmetic: every rank computes the same plan, and no process is
needed to test it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from copus.reshard.boxes import Box


@dataclass(frozen=True)
class Piece:
    """Part of a named global tensor that a rank holds, or needs."""

    key: str
    box: Box
    element_bytes: int


@dataclass(frozen=True)
class Transfer:
    """`box` of tensor `key` goes from the piece `source` of rank `sender` to the piece `target` of rank `receiver`."""

    key: str
    box: Box
    sender: int
    source: int
    """Index among the pieces that the sender holds."""
    receiver: int
    target: int
    """Index among the pieces that the receiver needs."""
    bytes: int


@dataclass
class Plan:
    """All transfers between ranks, and the copies inside each rank, in an order that all ranks share."""

    transfers: list[Transfer] = field(default_factory=list)
    copies: list[Transfer] = field(default_factory=list)

    @property
    def bytes_moved(self) -> int:
        """Bytes that change rank: what each rank lacks, and nothing twice."""
        return sum(transfer.bytes for transfer in self.transfers)


def make_plan(held: Sequence[Sequence[Piece]], needed: Sequence[Sequence[Piece]]) -> Plan:
    """Cover every needed piece of every rank from held pieces, by rank.

    What a rank holds itself is copied, not sent; of several holders the one that has the least to send so far sends.
    Raises ValueError where nobody holds a part that somebody needs.
    """
    holders: dict[str, list[tuple[int, int, Piece]]] = defaultdict(list)
    for rank, pieces in enumerate(held):
        for index, piece in enumerate(pieces):
            holders[piece.key].append((rank, index, piece))
    plan, sent = Plan(), [0] * len(held)
    for receiver, pieces in enumerate(needed):
        for target, piece in enumerate(pieces):
            _cover(plan, sent, holders[piece.key], receiver, target, piece)
    return plan


def _cover(
    plan: Plan, sent: list[int], holders: list[tuple[int, int, Piece]], receiver: int, target: int, piece: Piece
) -> None:
    def cost(holder: tuple[int, int, Piece]) -> tuple[bool, int]:
        return holder[0] != receiver, sent[holder[0]]

    missing = [piece.box]
    candidates = [holder for holder in holders if holder[2].box.intersect(piece.box)]
    while missing and candidates:
        holder = min(candidates, key=cost)
        candidates.remove(holder)
        sender, source, held = holder
        left: list[Box] = []
        for box in missing:
            common = box.intersect(held.box)
            if common is None:
                left.append(box)
                continue
            size = common.elements * piece.element_bytes
            transfer = Transfer(piece.key, common, sender, source, receiver, target, size)
            if sender == receiver:
                plan.copies.append(transfer)
            else:
                plan.transfers.append(transfer)
                sent[sender] += size
            left += box.subtract(common)
        missing = left
    if missing:
        raise ValueError(f"nobody holds {piece.key} {missing[0]}, which rank {receiver} needs")
