"""Which range of which parameter each data parallel rank owns, and where it lies in that rank's flat buffers.

The optimizer has two groups of parameters, those that decay and those that do not. ZeRO 1 and 2 lay the parameters of a
group end to end and cut the whole into equal shares; ZeRO 3 cuts every parameter by itself and lays a rank's shares end
to end. Shares are padded to be equal.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from copus.backends.adamw import ADAM_STATISTICS
from copus.reshard.boxes import Box, boxes_of_range
from copus.reshard.table import MASTER, Field, Row, ShardTable
from profiles.layout import Layout

Shape = tuple[int, ...]
Groups = Sequence[Mapping[str, Shape]]
"""The shapes of the parameters of each group, by name and in order."""

_ALIGNMENT = 2
"""Elements that every share of a flat group is a multiple of (`nccl_start_alignment_factor`)."""


class Partition(NamedTuple):
    """A range of a flattened parameter that one rank owns."""

    rank: int
    group: int
    name: str
    shape: Shape
    start: int
    stop: int
    position: int
    """Where the range begins in the rank's flat buffer of the group."""


def partitions(groups: Groups, layout: Layout) -> Iterator[Partition]:
    """All ranges of all ranks; ZeRO 1 to 3."""
    cut = _cut_each if layout.zero == 3 else _cut_whole
    for number, group in enumerate(groups):
        yield from cut(number, group, layout.dp)


def _cut_whole(number: int, group: Mapping[str, Shape], ranks: int) -> Iterator[Partition]:
    """Ranges of a group that is flattened and cut into equal shares (stage_1_and_2.py:505, bf16_optimizer.py:155)."""
    total = sum(math.prod(shape) for shape in group.values())
    share = _ALIGNMENT * math.ceil(total / (_ALIGNMENT * ranks))
    offset = 0
    for name, shape in group.items():
        end = offset + math.prod(shape)
        for rank in range(offset // share, math.ceil(end / share)):
            start, stop = max(rank * share, offset), min((rank + 1) * share, end)
            yield Partition(rank, number, name, shape, start - offset, stop - offset, start - rank * share)
        offset = end


def _cut_each(number: int, group: Mapping[str, Shape], ranks: int) -> Iterator[Partition]:
    """Ranges of parameters that are cut one by one (`_partition_param` in partition_parameters.py)."""
    position = 0
    for name, shape in group.items():
        elements = math.prod(shape)
        share = math.ceil(elements / ranks)
        for rank in range(ranks):
            start, stop = min(rank * share, elements), min((rank + 1) * share, elements)
            if start < stop:
                yield Partition(rank, number, name, shape, start, stop, position)
        position += share


def weight_field(name: str, shape: Shape, precision: str) -> Field:
    """The weight that the model computes with."""
    return Field(name, "bfloat16" if precision == "bf16" else "float32", shape)


def optimizer_fields(name: str, shape: Shape, precision: str) -> tuple[Field, ...]:
    """What the optimizer keeps of a weight. DeepSpeed has fp32 copies of fp32 weights too; they are no state."""
    kept = ((MASTER,) if precision == "bf16" else ()) + ADAM_STATISTICS
    return tuple(Field(f"{name}/{suffix}", "float32", shape) for suffix in kept)


def shard_table(groups: Groups, precision: str, layout: Layout) -> ShardTable:
    """Weights and optimizer state of every rank of a layout."""
    return ShardTable.of(_rows(groups, precision, layout))


def _rows(groups: Groups, precision: str, layout: Layout) -> Iterator[Row]:
    for group in groups:
        for name, shape in group.items():
            if layout.zero < 3:
                fields: tuple[Field, ...] = (weight_field(name, shape, precision),)
                if layout.zero == 0:
                    fields += optimizer_fields(name, shape, precision)
                yield from ((rank, fields, Box.whole(shape)) for rank in range(layout.dp))
    if layout.zero:
        for part in partitions(groups, layout):
            fields = optimizer_fields(part.name, part.shape, precision)
            if layout.zero == 3:
                fields = (weight_field(part.name, part.shape, precision), *fields)
            yield from ((part.rank, fields, box) for box in boxes_of_range(part.shape, part.start, part.stop))
