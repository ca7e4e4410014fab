"""Rectangular parts of tensors, and the geometry that resharding needs. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """The part of a tensor that begins at `offset` and has `shape` elements along its axes."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def between(cls, start: Sequence[int], stop: Sequence[int], axes: int) -> "Box":
        """From the first element and one past the last along every axis; axes beyond `axes` are padding."""
        return cls(tuple(start[:axes]), tuple(high - low for low, high in zip(start[:axes], stop[:axes], strict=True)))

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the last element along every axis."""
        return tuple(a + b for a, b in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: "Box") -> "Box | None":
        """The part that both cover, or None."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        if any(low >= high for low, high in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(high - low for low, high in zip(start, stop, strict=True)))

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box lies inside a tensor that holds `outer`."""
        starts = [a - b for a, b in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))

    def shifted(self, by: Sequence[int]) -> "Box":
        """The same box elsewhere."""
        return Box(tuple(a + b for a, b in zip(self.offset, by, strict=True)), self.shape)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements start … stop − 1 of a flattened tensor of `shape`, as boxes in flat order.

    A distributed optimizer cuts parameters at the ends of its buckets; at most 2·ndim − 1 boxes describe such a range.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        yield from _within_row(shape, first, start - first * row, stop - first * row)
        return
    if start % row:
        yield from _within_row(shape, first, start % row, row)
        first += 1
    whole_stop = stop // row
    if whole_stop > first:
        yield Box((first, *[0] * (len(shape) - 1)), (whole_stop - first, *shape[1:]))
    if stop % row:
        yield from _within_row(shape, whole_stop, 0, stop % row)


def _within_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((row, *box.offset), (1, *box.shape))
