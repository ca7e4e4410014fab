"""Tables of which rank holds which part of which tensor, for all ranks. No torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from copus.reshard.boxes import Box

ELEMENT_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of an element, by torch's name of its type."""

MASTER = "master"
"""The fp32 copy of a weight that is not fp32 itself, in the name of its field: `model.norm.weight/master`."""


class Field(NamedTuple):
    """One tensor of the state as it is on one rank that has everything: a weight, its fp32 master, or one statistic
    that the optimizer keeps of it."""

    name: str
    """Of a weight the name that Hugging Face gives it, `model.layers.3.mlp.down_proj.weight`, on every backend; of what
    is kept of it that name and a suffix: `/master`, or the statistic's name."""
    dtype: str
    """torch's name of the type, as in `ELEMENT_BYTES`."""
    shape: tuple[int, ...]
    """Any number of axes; none for a single number."""

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return ELEMENT_BYTES[self.dtype]


Place = tuple[str, tuple[int, ...]]
"""Where a shard begins: the field's name, and the first element along every axis."""
Row = tuple[int, tuple[Field, ...], Box]
"""A rank, fields that are cut alike, and the part of them that the rank holds."""


@dataclass(frozen=True)
class ShardTable:
    """A row per part of the state that a rank holds.

    Fields that are cut alike (such as both moments of Adam) share their rows: `groups` lists them, and a row names a
    group. Positions are padded to the largest number of axes of any field.
    """

    groups: tuple[tuple[Field, ...], ...]
    """Fields of equal shape whose rows are the same. The order is that in which a move goes through them."""
    rank: np.ndarray
    group: np.ndarray
    """Index into `groups`."""
    start: np.ndarray
    """First element along every axis, of shape (rows, axes)."""
    stop: np.ndarray
    """One past the last."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "ShardTable":
        """From plain rows."""
        index: dict[tuple[Field, ...], int] = {}
        ranks, groups, boxes = [], [], []
        for rank, fields, box in rows:
            ranks.append(rank)
            groups.append(index.setdefault(fields, len(index)))
            boxes.append(box)
        axes = max([1, *(len(box.offset) for box in boxes)])
        start, stop = np.zeros((len(boxes), axes), np.int64), np.ones((len(boxes), axes), np.int64)
        for row, box in enumerate(boxes):
            start[row, : len(box.offset)] = box.offset
            stop[row, : len(box.offset)] = box.stop
        return cls(tuple(index), np.array(ranks, np.int64), np.array(groups, np.int64), start, stop)

    @classmethod
    def concatenate(cls, tables: Sequence["ShardTable"]) -> "ShardTable":
        """All rows, in order."""
        index: dict[tuple[Field, ...], int] = {}
        axes = max(table.start.shape[1] for table in tables)
        columns: list[list[np.ndarray]] = [[], [], [], []]
        for table in tables:
            number = np.array([index.setdefault(fields, len(index)) for fields in table.groups], np.int64)
            padding = ((0, 0), (0, axes - table.start.shape[1]))
            start, stop = np.pad(table.start, padding), np.pad(table.stop, padding, constant_values=1)
            for column, values in zip(columns, (table.rank, number[table.group], start, stop), strict=True):
                column.append(values)
        return cls(tuple(index), *(np.concatenate(column) for column in columns))

    def on_ranks(self, ranks: np.ndarray) -> "ShardTable":
        """The same rows on all of `ranks`."""
        count = len(ranks)
        return ShardTable(
            self.groups,
            np.repeat(ranks, len(self.rank)),
            np.tile(self.group, count),
            np.tile(self.start, (count, 1)),
            np.tile(self.stop, (count, 1)),
        )

    def select(self, rows: np.ndarray) -> "ShardTable":
        """Some rows."""
        return ShardTable(self.groups, self.rank[rows], self.group[rows], self.start[rows], self.stop[rows])

    def of_rank(self, rank: int) -> dict[Place, tuple[Field, Box]]:
        """The shards of one rank, field by field."""
        shards: dict[Place, tuple[Field, Box]] = {}
        rows = np.flatnonzero(self.rank == rank)
        columns = (self.group[rows], self.start[rows], self.stop[rows])
        for group, start, stop in zip(*(column.tolist() for column in columns), strict=True):
            for field in self.groups[group]:
                box = Box.between(start, stop, len(field.shape))
                shards[field.name, box.offset] = field, box
        return shards

    def with_fields(self, keep: Callable[[Field], bool]) -> "ShardTable":
        """The rows of some fields only."""
        groups = [tuple(filter(keep, fields)) for fields in self.groups]
        kept = np.array([bool(fields) for fields in groups], bool)
        rows = np.flatnonzero(kept[self.group])
        number = np.cumsum(kept) - 1
        left = tuple(fields for fields in groups if fields)
        return ShardTable(left, self.rank[rows], number[self.group[rows]], self.start[rows], self.stop[rows])

    @property
    def fields(self) -> tuple[Field, ...]:
        """All fields, group by group."""
        return tuple(field for fields in self.groups for field in fields)

    @property
    def element_bytes(self) -> np.ndarray:
        """Bytes of one element of all fields of a group together, by group."""
        return np.array([sum(field.element_bytes for field in fields) for fields in self.groups], np.int64)

    @property
    def bytes(self) -> np.ndarray:
        """Bytes of every row, all fields together."""
        return (self.stop - self.start).prod(axis=1) * self.element_bytes[self.group]

    def __len__(self) -> int:
        return len(self.rank)
