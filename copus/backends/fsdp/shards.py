"""Which part of every parameter a rank holds: tensor parallel ranks cut matrices, FSDP cuts what is left by rows."""

from collections.abc import Iterable, Iterator

import numpy as np

from copus.backends.regions import state_fields
from copus.job import TrainingConfig
from copus.reshard.boxes import Box
from copus.reshard.table import Field, ShardTable
from profiles.layout import Layout

CUT_BY_ROWS = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Modules of which every tensor parallel rank has some rows of the weight: outputs, or tokens of the vocabulary."""
CUT_BY_COLUMNS = ("o_proj", "down_proj")
"""Modules of which it has some columns: inputs."""


def tensor_parallel_axis(name: str) -> int | None:
    """The axis along which tensor parallel ranks cut the parameter of that name; None if all have the whole."""
    module = name.split(".")[-2]
    return 0 if module in CUT_BY_ROWS else 1 if module in CUT_BY_COLUMNS else None


def fields_of(
    name: str, shape: tuple[int, ...], training: TrainingConfig
) -> Iterator[tuple[tuple[Field, ...], tuple[int, ...]]]:
    """What is kept of a parameter: fields that are cut alike, and the axes of the parameter that they have. First the
    weight that the optimizer updates and what has its shape.

    With bf16 that weight is an fp32 master, unless the job has none: FSDP makes the bf16 weights from the masters
    whenever it gathers them, and they are no state.
    """
    weight = Field(name, "bfloat16" if training.precision == "bf16" else "float32", shape)
    has_master = training.precision == "bf16" and training.has_fp32_weights
    kept = list(state_fields(weight, training.optimizer, has_master=has_master))
    if not has_master:
        kept.insert(0, (weight, tuple(range(len(shape)))))
    for axes in dict.fromkeys(axes for _, axes in kept):
        yield tuple(field for field, own in kept if own == axes), axes


def boxes(name: str, shape: tuple[int, ...], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """First element and one past the last along each axis that each rank holds, of shape (ranks, axes) each.

    FSDP cuts the first axis of what a tensor parallel rank has as `torch.chunk` does: equal shares, rounded up, so that
    the last ranks may have less, or nothing.
    """
    rank = np.arange(layout.accelerators)
    start = np.zeros((len(rank), len(shape)), np.int64)
    stop = np.tile(np.array(shape, np.int64), (len(rank), 1))
    axis = tensor_parallel_axis(name)
    if axis is not None:
        size = shape[axis] // layout.tp
        start[:, axis] = rank % layout.tp * size
        stop[:, axis] = start[:, axis] + size
    first, end = start[:, 0].copy(), stop[:, 0].copy()
    share = -(-(end - first) // layout.dp_shard)
    start[:, 0] = np.minimum(first + rank // layout.tp % layout.dp_shard * share, end)
    stop[:, 0] = np.minimum(start[:, 0] + share, end)
    return start, stop


def own_box(name: str, shape: tuple[int, ...], layout: Layout, rank: int) -> Box:
    """The part of a parameter that one rank holds; it may be empty."""
    start, stop = boxes(name, shape, layout)
    return Box.between(start[rank].tolist(), stop[rank].tolist(), len(shape))


def shard_table(
    parameters: Iterable[tuple[str, tuple[int, ...]]], training: TrainingConfig, layout: Layout
) -> ShardTable:
    """Weights and optimizer state of every rank of a layout, from the names and shapes of the parameters."""
    groups: list[tuple[Field, ...]] = []
    columns = []
    for name, shape in parameters:
        start, stop = boxes(name, shape, layout)
        rank = np.flatnonzero((stop > start).all(axis=1))
        for fields, axes in fields_of(name, shape, training):
            padding = ((0, 0), (0, 2 - len(axes)))
            ends = (
                np.pad(start[rank][:, axes], padding),
                np.pad(stop[rank][:, axes], padding, constant_values=1),
            )
            columns.append((rank, np.full(len(rank), len(groups), np.int64), *ends))
            groups.append(fields)
    return ShardTable(tuple(groups), *(np.concatenate(column) for column in zip(*columns, strict=True)))
