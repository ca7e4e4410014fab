"""Whole documents packed into sequences, so that few are cut: best-fit decreasing, a heuristic for bin packing
(2404.10830 does it to the documents of language models)."""

from bisect import bisect_left, insort
from collections import defaultdict
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Pieces of documents, sequence by sequence."""

    documents: np.ndarray
    """Number of the document of each piece, int32."""
    firsts: np.ndarray
    """First token of the piece in its document, int64."""
    lasts: np.ndarray
    """The token after its last, int64."""
    bounds: np.ndarray
    """Where the pieces of each sequence begin, and where those of the last end: int64, (sequences + 1,)."""


def best_fit(lengths: np.ndarray, order: np.ndarray, capacity: int) -> Packed:
    """Pack documents of these lengths, in tokens, into sequences of at most `capacity` tokens.

    Of a longer document the first tokens fill sequences of their own, and what is left is packed. The longest remaining
    piece goes where it leaves the least room; `order`, a permutation of the documents, decides between equal lengths.
    The number of sequences does not depend on it.
    """
    full, rest = lengths // capacity, lengths % capacity
    rests = order[rest[order] > 0]
    rests = rests[np.argsort(-rest[rests], kind="stable")]
    with_room: dict[int, list[int]] = defaultdict(list)  # sequences by the room that they have left
    rooms: list[int] = []  # in ascending order
    count = 0
    sequence_of_rest = np.empty(len(rests), np.int64)
    for place, length in enumerate(rest[rests].tolist()):
        fit = bisect_left(rooms, length)
        if fit == len(rooms):
            sequence, room, count = count, capacity, count + 1
        else:
            room = rooms[fit]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del rooms[fit]
        sequence_of_rest[place] = sequence
        if room > length:
            if not with_room[room - length]:
                insort(rooms, room - length)
            with_room[room - length].append(sequence)
    of_full = order.repeat(full[order])
    nth = np.arange(len(of_full)) - np.repeat(np.cumsum(full[order]) - full[order], full[order])
    documents = np.concatenate([rests, of_full])
    firsts = np.concatenate([full[rests] * capacity, nth * capacity]).astype(np.int64)
    lasts = np.concatenate([lengths[rests], (nth + 1) * capacity]).astype(np.int64)
    sequences = np.concatenate([sequence_of_rest, count + np.arange(len(of_full))])
    by_sequence = np.argsort(sequences, kind="stable")
    bounds = np.searchsorted(sequences[by_sequence], np.arange(count + len(of_full) + 1)).astype(np.int64)
    return Packed(documents[by_sequence].astype(np.int32), firsts[by_sequence], lasts[by_sequence], bounds)
