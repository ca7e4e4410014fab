"""What may be chosen, as arrays, and what it costs to go from one to another."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from profiles.configuration import Configuration

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Rung = Literal["batch", "micro-batch", "layout"]

RUNGS: tuple[Rung, ...] = ("batch", "micro-batch", "layout")
"""The ladder, cheapest first: a move costs what the dearest thing costs that changes."""


def rung_of(before: Configuration, after: Configuration) -> Rung:
    """The dearest thing that changes between two configurations."""
    if before.layout != after.layout:
        return "layout"
    return "micro-batch" if before.micro_batch != after.micro_batch else "batch"


@dataclass(frozen=True)
class Menu:
    """C configurations. Arrays about them have C as their last axis; leading axes are runs that are decided at once."""

    configurations: tuple[Configuration, ...]
    """The candidates, in any order."""

    @classmethod
    def of(cls, configurations: Sequence[Configuration]) -> "Menu":
        """A menu of some configurations."""
        return cls(tuple(configurations))

    def __len__(self) -> int:
        return len(self.configurations)

    @cached_property
    def global_batch(self) -> Floats:
        """Global batches, sequences, shape (C,)."""
        return np.array([c.global_batch for c in self.configurations], float)

    @cached_property
    def micro_batch(self) -> Indices:
        """Micro-batches, sequences, shape (C,)."""
        return np.array([c.micro_batch for c in self.configurations], np.int64)

    @cached_property
    def layout(self) -> Indices:
        """Number of the layout of each, shape (C,)."""
        numbers: dict[object, int] = {}
        return np.array([numbers.setdefault(c.layout, len(numbers)) for c in self.configurations], np.int64)

    @cached_property
    def passes(self) -> Indices:
        """Number of the layout and micro-batch of each, shape (C,)."""
        numbers: dict[tuple[int, int], int] = {}
        pairs = zip(self.layout.tolist(), self.micro_batch.tolist(), strict=True)
        return np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], np.int64)

    def move_seconds(self, start: Indices, rungs: Floats) -> Floats:
        """Seconds from each run's configuration `start`, shape (R,), to every other, shape (R, C). `rungs` are the
        seconds of the three rungs, shape (3,) or (R, 3)."""
        start, costs = np.asarray(start), np.broadcast_to(rungs, (len(start), 3))
        rung = np.where(self.passes == self.passes[start, None], 0, 1)
        rung = np.where(self.layout == self.layout[start, None], rung, 2)
        moved = np.arange(len(self)) != start[:, None]
        return np.where(moved, np.take_along_axis(costs, rung, axis=1), 0.0)

    def cheapest(self, values: Floats, rungs: Floats) -> Floats:
        """min over j' of (cost of the move j → j') + values[…, j'], for every j: the shape of `values`.

        `rungs` broadcasts to (…, 3), ascending: then the minima over layouts and micro-batches are all that is needed.
        """
        rungs = np.asarray(rungs)
        best = np.minimum(values, values.min(axis=-1, keepdims=True) + rungs[..., 2:3])
        for groups, cost in ((self._by_layout, rungs[..., 1:2]), (self._by_pass, rungs[..., 0:1])):
            order, starts, number = groups
            least = np.minimum.reduceat(values[..., order], starts, axis=-1)
            best = np.minimum(best, least[..., number] + cost)
        return best

    @cached_property
    def _by_layout(self) -> tuple[Indices, Indices, Indices]:
        return _groups(self.layout)

    @cached_property
    def _by_pass(self) -> tuple[Indices, Indices, Indices]:
        return _groups(self.passes)


def _groups(number: Indices) -> tuple[Indices, Indices, Indices]:
    """An order in which groups lie together, where each begins in it, and the group of each."""
    order = np.argsort(number, kind="stable")
    starts = np.flatnonzero(np.diff(number[order], prepend=-1))
    return order, starts, number
