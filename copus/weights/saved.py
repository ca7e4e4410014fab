"""The weights that a job begins with, as parts of files: the ranks read them as they read a checkpoint."""

from pathlib import Path

import torch.distributed as dist

from copus.backends.base import Backend
from copus.collectives import broadcast_from_rank0
from copus.job import JobConfig, JobError
from copus.reshard.boxes import Box
from copus.reshard.table import Field
from copus.sharded_checkpoint import Chunk, SavedState, read_index, zeros_below
from copus.weights.families import state_shape, weights_of
from copus.weights.megatron_lm import read_megatron
from copus.weights.safetensors import DTYPES
from copus.weights.source import Source, digest_of, find_source, locate
from profiles.model_shape import ModelShape


def begin(job: JobConfig, backend: Backend) -> None:
    """Build the configuration that a job starts in, with the weights that it begins with. Collective.

    Raises JobError on every rank if these are not the ones that were submitted, or not those of the job's model.
    """
    configuration, path = job.training.configuration, job.training.init_from
    if path is None:
        backend.build(configuration)
        return
    source = find_source(path)
    digest = broadcast_from_rank0(digest_of(source) if dist.get_rank() == 0 else None)
    if job.training.init_digest not in (None, digest):
        raise JobError(
            f"training.init_from({path}): the weights have changed since the job was submitted: their digest is "
            f"{digest}, and was {job.training.init_digest}"
        )
    weights = read_weights(source, job.model)
    backend.build(configuration, initial_weights=False)
    backend.load_weights(source.folder, backend.translate_saved(weights) if source.kind == "run" else weights)


def read_weights(source: Source, model: ModelShape) -> SavedState:
    """Where each weight of a model is in the files of a source. Raises JobError if they are those of another model."""
    if source.kind == "hugging_face":
        return _read_hugging_face(source.folder, model)
    if source.kind == "megatron":
        return read_megatron(source.folder, model)
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
