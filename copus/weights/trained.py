"""The weights in a checkpoint of copus, and what they were trained on: what every export starts from."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

import torch

from copus.checkpoints.sharded import Chunk, SavedFiles, read_index
from copus.checkpoints.store import read_state
from copus.event_lines import event_lines, without_replays
from copus.events import Evaluate, Step, parse_event
from copus.job import JobConfig, JobError
from copus.reshard.boxes import Box
from copus.reshard.table import MASTER, Field
from copus.weights import former_checkpoint
from copus.weights.families import state_shape, weights_of
from profiles.model_shape import ModelShape

Precision = Literal["bf16", "fp16", "fp32"]
TORCH_NAMES: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


_PIECE_BYTES = 32 * 2**20
"""Most bytes that are read at a time, in fp32."""


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """A tensor in pieces of some megabytes: the first row of each, and its number of rows."""
    rows, *row = shape
    step = max(1, _PIECE_BYTES // (4 * math.prod(row)))
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


class TrainedWeights:
    """The weights of a checkpoint by their names in the state, read part by part: the fp32 ones if it has these."""

    def __init__(self, checkpoint: Path, model: ModelShape) -> None:
        """Raises JobError if the checkpoint does not have exactly the weights of the model."""
        saved = former_checkpoint.translate(read_index(checkpoint), model)
        by_name = {field.name: (field, chunks) for field, chunks in saved.items()}
        self._places: dict[str, tuple[Field, list[Chunk]]] = {}
        for name, shape in weights_of(model).items():
            place = by_name.get(f"{name}/{MASTER}") or by_name.get(name)
            whole = state_shape(name, shape, model)
            if place is None or place[0].shape != whole:
                has = f"{list(place[0].shape)}, not {list(whole)}" if place else "not there"
                raise JobError(f"{checkpoint.name}: {name} is {has}: the checkpoint is of another model")
            self._places[name] = place
        self._files = SavedFiles(checkpoint)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A part of a weight, in the host's memory."""
        return self._files.read(*self._places[name], box)

    def __enter__(self) -> "TrainedWeights":
        self._files.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)


class Training(NamedTuple):
    """What a model was trained on, until a checkpoint."""

    tokens: int
    steps: int
    data: str
    """Digest of the prepared data; empty if the checkpoint is older than that."""
    loss: float | None
    """Training loss of the last step, nats per token."""
    held_out_loss: float | None
    """Held-out loss of the last evaluation, nats per token."""


def training_until(checkpoint: Path, run: Path, job: JobConfig) -> Training:
    """What the checkpoint and the log of its run say of the training."""
    state, _ = read_state(checkpoint)
    loss = held_out_loss = None
    events = (parse_event(line.text) for line in event_lines(run, "start", "step", "evaluate"))
    for event in without_replays(event for event in events if event is not None):
        if event.samples_consumed <= state.samples_consumed:
            loss = event.loss if isinstance(event, Step) else loss
            held_out_loss = event.loss if isinstance(event, Evaluate) else held_out_loss
    return Training(state.samples_consumed * job.model.seq_len, state.step, state.data, loss, held_out_loss)
