"""Which parts of which tensors of the state a rank's parameter consists of, and what an optimizer keeps of each.

Backends may fuse weights (Megatron's queries, keys and values) or cut them over ranks; the state has whole tensors with
Hugging Face's names. A `Region` says where they meet.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from copus.optimizers import BatchRules
from copus.reshard.boxes import Box
from copus.reshard.table import MASTER, Field


@dataclass(frozen=True)
class Region:
    """Part of a rank's tensor that lies in one piece in a tensor of the state."""

    box: Box
    """In the rank's tensor."""
    weight: Field
    """The tensor of the state, whole."""
    offset: tuple[int, ...]
    """First element of the box along each axis of that tensor."""

    def place(self, part: Box) -> Box:
        """A part of the box, in coordinates of the tensor of the state."""
        return part.shifted([a - b for a, b in zip(self.offset, self.box.offset, strict=True)])

    @property
    def slices(self) -> tuple[slice, ...]:
        """Slices of the box, for indexing the rank's tensor."""
        return tuple(map(slice, self.box.offset, self.box.stop))


@dataclass(frozen=True)
class HeldWeight:
    """What a parameter of the optimizer consists of on this rank, and which ranks hold the rest of it."""

    shape: tuple[int, ...]
    """Shape of the parameter."""
    regions: tuple[Region, ...]
    """They cover it, from the first row to the last."""
    row_groups: tuple[dist.ProcessGroup, ...] = ()
    """Groups over which the rows of the whole tensors are cut: a sum over rows is one over these ranks too."""
    column_groups: tuple[dist.ProcessGroup, ...] = ()
    """Groups over which the columns are cut."""

    @property
    def names(self) -> list[str]:
        """The tensors of the state that it has parts of, in order."""
        return list(dict.fromkeys(region.weight.name for region in self.regions))

    def statistic_shapes(self, optimizer: BatchRules) -> dict[str, tuple[int, ...]]:
        """Shape of what the optimizer keeps of the parameter, by statistic. Means over rows, of which every tensor of
        the state has its own, are the rows of a matrix."""
        weight = self.regions[0].weight
        shapes: dict[str, tuple[int, ...]] = {}
        for name, axes in optimizer.statistics(weight.name, weight.shape):
            if len(axes) == len(weight.shape):
                shapes[name] = self.shape  # the parameter may be a range of a flattened weight
            else:
                shapes[name] = (self.shape[0],) if axes == (0,) else (len(self.names), self.shape[1])
        return shapes

    def part_of(self, statistic: torch.Tensor, axes: Sequence[int], region: Region) -> torch.Tensor:
        """The part of a statistic that belongs to a region: a view."""
        slices = tuple(region.slices[axis] for axis in axes)
        return statistic[self.names.index(region.weight.name)][slices] if axes == (1,) else statistic[slices]


def optimizer_state(
    optimizer: torch.optim.Optimizer, param: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """What an optimizer keeps of a parameter, fp32 tensors of these shapes; zeros if it has made no step yet."""
    state: dict[str, torch.Tensor] = optimizer.state[param]
    if not state:
        if isinstance(optimizer, torch.optim.AdamW):  # fused AdamW wants its step count beside the parameter
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name, shape in shapes.items():
            state[name] = torch.zeros(shape, dtype=torch.float32, device=param.device)
    return state


def state_fields(weight: Field, optimizer: BatchRules, *, has_master: bool) -> Iterator[tuple[Field, tuple[int, ...]]]:
    """What is kept of a tensor of the state beside itself, and the axes of the tensor that each field has."""
    if has_master:
        yield Field(f"{weight.name}/{MASTER}", "float32", weight.shape), tuple(range(len(weight.shape)))
    for name, axes in optimizer.statistics(weight.name, weight.shape):
        yield Field(f"{weight.name}/{name}", "float32", tuple(weight.shape[axis] for axis in axes)), axes


def state_rows(
    weight: Field, box: Box, optimizer: BatchRules, *, has_master: bool
) -> Iterator[tuple[tuple[Field, ...], Box]]:
    """Rows of a shard table for what is kept of a box of a tensor: fields that are cut alike, and their part."""
    together: dict[tuple[int, ...], list[Field]] = {}
    for field, axes in state_fields(weight, optimizer, has_master=has_master):
        together.setdefault(axes, []).append(field)
    for axes, fields in together.items():
        offset, shape = (tuple(values[axis] for axis in axes) for values in (box.offset, box.shape))
        yield tuple(fields), Box(offset, shape)
