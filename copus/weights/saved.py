"""What a job begins with, as parts of files: the ranks read them as they read a checkpoint."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from copus.backends.base import Backend
from copus.checkpoints.safe_loading import DamagedFileError, UnsafeCheckpointError
from copus.checkpoints.sharded import Chunk, SavedState, read_index, zeros_below
from copus.checkpoints.store import find_damage, read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import broadcast_from_rank0
from copus.job import JobConfig, JobError
from copus.reshard.boxes import Box
from copus.reshard.table import MASTER, Field
from copus.weights.families import state_shape, weights_of
from copus.weights.megatron_lm import read_megatron, read_step_count
from copus.weights.safetensors import DTYPES
from copus.weights.source import Source, digest_of, find_source, locate
from profiles.model_shape import ModelShape


def begin(job: JobConfig, backend: Backend) -> TrainerState:
    """Build the configuration that a job starts in, with the weights that it begins with, and the optimizer's state if
    it is asked for. Returns the trainer's. Collective.

    Raises JobError on every rank if these are not the ones that were submitted, or not those of the job's model.
    """
    configuration, path = job.training.configuration, job.training.init_from
    if path is None:
        backend.build(configuration)
        return TrainerState()
    source = find_source(path)
    digest = broadcast_from_rank0(digest_of(source) if dist.get_rank() == 0 else None)
    if job.training.init_digest not in (None, digest):
        raise JobError(
            f"training.init_from({path}): the weights have changed since the job was submitted: their digest is "
            f"{digest}, and was {job.training.init_digest}"
        )
    if source.kind == "run" and (reason := find_damage(source.folder)):
        raise JobError(f"training.init_from({source.folder}): the checkpoint does not verify: {reason}")
    with_optimizer = job.training.init_optimizer
    state = _optimizer_steps(source) if with_optimizer else TrainerState()
    with _damage_told(source.folder):
        saved = read_source(source, job.model, with_optimizer=with_optimizer)
    backend.build(configuration, initial_weights=False)
    with _damage_told(source.folder):
        if source.kind == "run":
            saved = backend.translate_saved(saved)
        if with_optimizer:
            _check_statistics(job, source.folder, saved)
            backend.load_state(source.folder, saved, state.optimizer_steps)
        else:
            backend.load_weights(source.folder, saved)
    return state


def _check_statistics(job: JobConfig, folder: Path, saved: SavedState) -> None:
    """Raise JobError if the files have something of an optimizer that the job's own does not keep."""
    parts = [(field, *field.name.partition("/")[::2]) for field in saved]
    shapes = {weight: field.shape for field, weight, suffix in parts if suffix in ("", MASTER)}
    for field, weight, suffix in parts:
        if suffix in ("", MASTER) or weight not in shapes:
            continue
        kept = {statistic.name for statistic in job.training.optimizer.statistics(weight, shapes[weight])}
        if suffix not in kept:
            raise JobError(
                f"training.init_optimizer: {folder} has {field.name}, which training.optimizer.kind("
                f"{job.training.optimizer.kind}) does not keep: another optimizer wrote it"
            )


@contextlib.contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    """Raise JobError for files of somebody else's that cannot be read: they have no checksums, and another start would
    find them the same."""
    try:
        yield
    except (DamagedFileError, UnsafeCheckpointError) as error:
        raise JobError(f"training.init_from({folder}): its files are not complete, or damaged: {error}") from error


def _optimizer_steps(source: Source) -> TrainerState:
    """The state of a trainer that has done nothing yet, whose optimizer has its steps behind it."""
    if source.kind == "run":
        before, _ = read_state(source.folder)
        return TrainerState(optimizer_steps=before.optimizer_steps, beta2_product=before.beta2_product)
    try:
        steps, beta2 = read_step_count(source.folder)
    except ValueError as error:
        raise JobError(f"training.init_optimizer: {error}") from None
    return TrainerState(optimizer_steps=steps, beta2_product=None if beta2 is None else beta2**steps)


def read_source(source: Source, model: ModelShape, *, with_optimizer: bool = False) -> SavedState:
    """Where each weight of a model is in the files of a source, and `with_optimizer` the optimizer's state. Raises
    JobError if they are those of another model."""
    if source.kind == "hugging_face":
        return _read_hugging_face(source.folder, model)
    if source.kind == "megatron":
        return read_megatron(source.folder, model, with_optimizer=with_optimizer)
    return read_index(source.folder)


def _read_hugging_face(folder: Path, model: ModelShape) -> SavedState:
    saved: SavedState = {}
    shapes = weights_of(model)
    for name, (stored, tensor) in locate(folder, model).items():
        in_file = stored.shape[::-1] if stored.is_transposed else stored.shape
        weight = shapes[name]
        begins = (-stored.first_row, *[0] * (len(weight) - 1))
        chunk = Chunk(
            Box.whole(weight),
            Box(begins, in_file),
            tensor.file,
            tensor.offset,
            tensor.length,
            is_plain=True,
            is_transposed=stored.is_transposed,
            subtracted=stored.subtracted,
        )
        whole = state_shape(name, weight, model)
        saved[Field(name, DTYPES[tensor.dtype], whole)] = [chunk, *zeros_below(weight, whole)]
    return saved
