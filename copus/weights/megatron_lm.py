"""Checkpoints of Megatron-LM in the format `torch_dist`: weights and optimizer state under the names of the state.

How these are stored is a subject of its own (`copus.weights.megatron_stored`). The optimizer's state can be read if it
has the names and shapes of the weights, as the plain optimizers write it, and the distributed one in its format
`fully_reshardable`. In its usual format, `dp_reshardable`, it is the gradient buckets of the layout that wrote it.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from copus.checkpoints.safe_loading import DamagedFileError, damage_told, load_plain_values
from copus.checkpoints.sharded import Chunk, SavedState, read_index, read_object, zeros_below
from copus.job import JobError
from copus.reshard.boxes import Box
from copus.reshard.table import MASTER, Field
from copus.weights.families import weights_of
from copus.weights.megatron_names import Part, hugging_face_parts, without_fusion
from copus.weights.megatron_stored import Weight, weights_in
from profiles.model_shape import ModelShape

_WEIGHTS = re.compile(r"(?:module\.|model\.)?((?:(?:embedding|decoder)\..+[._]|output_layer\.)(?:weight|bias))")
"""Names of weights; optimizer state, random states and what an index says of objects are left out."""
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
"""Names of optimizer state: what it is, and of which weight."""
_MASTERS = ("param", "fp32_param")
"""With and without the distributed optimizer."""
_IN_BUCKETS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.")
_ROWS_OF_TOKENS = ("embedding.word_embeddings.weight", "output_layer.weight")
_COMMON, _COMMON_OBJECT = "common.pt", "common_state/shard_0_1"
"""Everything in a checkpoint that is no tensor, a pickle: a file up to megatron-core 0.18, an object of 0.19."""
_MOST_PADDING = 8192
"""More rows than that are not for the sake of tensor parallelism: the vocabulary is another one."""


def read_megatron(folder: Path, model: ModelShape, *, with_optimizer: bool = False) -> SavedState:
    """Where each weight of a model is in a checkpoint of Megatron-LM, and `with_optimizer` what the optimizer keeps of
    it; what else is in it is passed over.

    The rows that pad Megatron's vocabulary are replaced by zeros. Raises JobError for another vocabulary, and for
    optimizer state in a format that is not read; DamagedFileError for files that are shorter than the index says.
    """
    index = read_index(folder)
    if with_optimizer:
        _check_optimizer(folder, index)
    _check_lengths(folder, index)
    saved: SavedState = {}
    for field, kept, chunks in _weights_and_statistics(index):
        if with_optimizer or not kept:
            for part, cut in itertools.chain.from_iterable(_parts(folder, field, chunk, model) for chunk in chunks):
                saved.setdefault(part._replace(name=part.name + kept), []).append(cut)
    shapes = weights_of(model)
    for field, chunks in saved.items():
        chunks += zeros_below(shapes.get(field.name.partition("/")[0], field.shape), field.shape)
    return saved


def _check_lengths(folder: Path, index: SavedState) -> None:
    """Raise DamagedFileError for a file that ends before its last tensor does. Even if nobody reads that tensor, as
    it is the optimizer's: there are no checksums, and of a copy that broke off other files may be missing more."""
    ends: dict[str, int] = {}
    for chunk in itertools.chain.from_iterable(index.values()):
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.length)
    for name, end in ends.items():
        with damage_told():
            size = (folder / name).stat().st_size
        if size < end:
            raise DamagedFileError(f"{name} has {size} bytes, and its last tensor ends at byte {end}")


def _weights_and_statistics(index: SavedState) -> Iterator[tuple[Field, str, list[Chunk]]]:
    """The tensors that are a weight or belong to one, with the weight's name and that which the state appends to it.
    Only one of those that are there under two names: norms that Transformer Engine fuses, and some layers do not."""
    seen: set[tuple[str, str]] = set()
    for field, chunks in index.items():
        name, kept = field.name, ""
        if statistic := _OPTIMIZER.fullmatch(name):
            name, kept = statistic[2], f"/{MASTER if statistic[1] in _MASTERS else statistic[1]}"
        match = _WEIGHTS.fullmatch(name)
        if match is not None and (own := (without_fusion(match[1]), kept)) not in seen:
            seen.add(own)
            yield field._replace(name=own[0]), kept, chunks


def _check_optimizer(folder: Path, index: SavedState) -> None:
    """Raise JobError if the optimizer's state is not there, or not under the names and in the shapes of the weights."""
    where = f"training.init_optimizer: {folder}"
    fields = [(field, kept) for field, kept, _ in _weights_and_statistics(index)]
    shapes = {field.name: field.shape for field, kept in fields if not kept}
    statistics = [field for field, kept in fields if kept]
    other = next((field for field in statistics if field.shape != shapes.get(field.name)), None)
    if other is not None or any(_IN_BUCKETS.match(field.name) for field in index):
        written = "fully_sharded_model_space" if other else "dp_reshardable"
        raise JobError(
            f"{where} has the state of the distributed optimizer in the format {written}, which is not read: load it "
            "in Megatron-LM and save it with --dist-ckpt-optim-fully-reshardable"
        )
    if not statistics:
        raise JobError(f"{where} has no optimizer state")


def read_step_count(folder: Path) -> tuple[int, float | None]:
    """Optimizer steps that a checkpoint of Megatron-LM has behind it, and its β2; None if the optimizer is not Adam.

    Raises JobError if it does not say.
    """
    name, state = _common_state(folder)
    for group in _groups(state.get("optimizer")):
        steps = group.get("step", state.get("iteration"))
        if isinstance(steps, int | float):
            betas = group.get("betas")
            return int(steps), float(betas[1]) if isinstance(betas, list | tuple) else None
    raise JobError(f"training.init_optimizer: {folder / name} says no step count")


def _common_state(folder: Path) -> tuple[str, dict[str, Any]]:
    """Everything that is no tensor, and where it is in the checkpoint. Raises ValueError if it cannot be read."""
    name, source = _COMMON, cast("Path | IO[bytes]", folder / _COMMON)
    if not (folder / _COMMON).is_file() and (saved := read_object(folder, _COMMON_OBJECT)) is not None:
        name, source = _COMMON_OBJECT, saved
    try:
        values = load_plain_values(source)
    except ValueError as error:
        raise ValueError(f"{folder / name}: {error}") from None
    if isinstance(values, list) and len(values) == 1:  # megatron-core wraps its objects
        (values,) = values
    if not isinstance(values, dict):
        raise ValueError(f"{folder / name}: no dictionary")
    return name, values


def _groups(state: Any) -> Iterator[dict[str, Any]]:
    """The parameter groups in the state of an optimizer, which may be a chain of others."""
    for name, value in state.items() if isinstance(state, dict) else ():
        if name == "param_groups" and isinstance(value, list):
            yield from (group for group in value if isinstance(group, dict))
        else:
            yield from _groups(value)


def _parts(folder: Path, field: Field, chunk: Chunk, model: ModelShape) -> Iterator[tuple[Field, Chunk]]:
    """The parts of a chunk that are in one weight of the state each."""
    try:
        weights = list(weights_in(field.name, field.shape, chunk.box, model))
    except ValueError as error:
        raise JobError(f"training.init_from({folder}): {error}") from None
    for weight in weights:
        for part in _parts_of(folder, weight, model):
            moved = [new - old for new, old in zip(part.offset, part.box.offset, strict=True)]
            yield (
                Field(part.name, field.dtype, part.shape),
                chunk._replace(box=part.box.shifted(moved), stored=weight.stored.shifted(moved)),
            )


def _parts_of(folder: Path, weight: Weight, model: ModelShape) -> Iterator[Part]:
    name, shape, box = weight.name, weight.shape, weight.box
    if name in _ROWS_OF_TOKENS:
        if not 0 <= shape[0] - model.vocab < _MOST_PADDING:
            raise JobError(
                f"training.init_from({folder}): {name} has {shape[0]} rows, and model.vocab is {model.vocab}"
            )
        own_rows = box.intersect(Box.whole((model.vocab, *shape[1:])))
        shape = (model.padded_vocab, *shape[1:])
        if own_rows is None:
            return
        box = own_rows
    yield from hugging_face_parts(name, shape, box, model)
