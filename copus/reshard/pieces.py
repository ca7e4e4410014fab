"""Who holds what, of all ranks at once: a table with one row for each part of a named tensor on a rank. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from copus.reshard.boxes import Box

Row = tuple[int, str, Box, int]
"""Rank, name of the global tensor, the part of it that the rank has, and bytes of an element."""


@dataclass(frozen=True)
class Pieces:
    """Rows of equal length in every column; positions are padded to two axes.

    A tensor may stand for several of one shape (both moments of Adam, say); its element is then as many bytes as those
    of all of them together.
    """

    names: tuple[str, ...]
    """Global tensors; the order is that in which a move goes through them."""
    element_bytes: np.ndarray
    """Of each name."""
    rank: np.ndarray
    name: np.ndarray
    """Index into `names`."""
    start: np.ndarray
    """First element along each axis, of shape (rows, 2)."""
    stop: np.ndarray
    """One past the last."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Pieces":
        """From plain rows. Tensors have one or two axes."""
        index: dict[str, int] = {}
        sizes: list[int] = []
        ranks, names, starts, stops = [], [], [], []
        for rank, name, box, element_bytes in rows:
            if name not in index:
                index[name] = len(index)
                sizes.append(element_bytes)
            ranks.append(rank)
            names.append(index[name])
            starts.append((*box.offset, 0)[:2])
            stops.append((*(a + b for a, b in zip(box.offset, box.shape, strict=True)), 1)[:2])
        return cls(
            tuple(index),
            np.array(sizes, np.int64),
            np.array(ranks, np.int64),
            np.array(names, np.int64),
            np.array(starts, np.int64).reshape(-1, 2),
            np.array(stops, np.int64).reshape(-1, 2),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Pieces"]) -> "Pieces":
        """All rows, in order."""
        names, element_bytes, numbers = merge_names(parts)
        name = [number[part.name] for number, part in zip(numbers, parts, strict=True)]
        columns = ("rank", "start", "stop")
        rank, start, stop = (np.concatenate([getattr(part, each) for part in parts]) for each in columns)
        return cls(names, element_bytes, rank, np.concatenate(name), start, stop)

    def on_ranks(self, ranks: np.ndarray) -> "Pieces":
        """The same rows on each of `ranks`."""
        count = len(self.rank)
        return Pieces(
            self.names,
            self.element_bytes,
            np.repeat(ranks, count),
            np.tile(self.name, len(ranks)),
            np.tile(self.start, (len(ranks), 1)),
            np.tile(self.stop, (len(ranks), 1)),
        )

    def of_rank(self, rank: int) -> "Pieces":
        """One rank's rows."""
        return self.select(np.flatnonzero(self.rank == rank))

    def select(self, rows: np.ndarray) -> "Pieces":
        """Some rows."""
        return Pieces(
            self.names, self.element_bytes, self.rank[rows], self.name[rows], self.start[rows], self.stop[rows]
        )

    @property
    def bytes(self) -> np.ndarray:
        """Of each row."""
        return (self.stop - self.start).prod(axis=1) * self.element_bytes[self.name]

    def __len__(self) -> int:
        return len(self.rank)


def merge_names(tables: Sequence[Pieces]) -> tuple[tuple[str, ...], np.ndarray, list[np.ndarray]]:
    """The names of several tables, the bytes of an element of each, and for each table the numbers of its names there.

    Raises ValueError where two tables do not agree on the size of an element.
    """
    index: dict[str, int] = {}
    sizes: list[int] = []
    numbers = []
    for table in tables:
        number = []
        for name, size in zip(table.names, table.element_bytes.tolist(), strict=True):
            if name not in index:
                index[name] = len(index)
                sizes.append(size)
            elif sizes[index[name]] != size:
                raise ValueError(f"{name}: elements of {sizes[index[name]]} and of {size} bytes")
            number.append(index[name])
        numbers.append(np.array(number, np.int64))
    return tuple(index), np.array(sizes, np.int64), numbers
