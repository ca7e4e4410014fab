"""The log of a noise meter: one JSON line for each optimizer step of a trainer that is not ours.

`copus.NoiseMeter` writes it beside somebody's own training loop, and `copus advise` reads it. Without torch.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from copus.validation_messages import first_message
from profiles.layout import Layout
from profiles.noise_scale import NoiseScale
from profiles.record import NonNegativeInt, PositiveInt


class MeterStep(BaseModel):
    """An optimizer step: how long it took, and the noise scale after it. Unknown fields are ignored, so that a reader
    understands what a later version wrote."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    step: NonNegativeInt
    """Optimizer steps done, this one included."""
    samples: NonNegativeInt
    """Sequences trained on, this step's included."""
    global_batch: PositiveInt
    """Sequences in the step, over all data parallel ranks."""
    micro_batch: PositiveInt | None = None
    """Sequences in one forward-backward pass of a rank; None if the trainer does not say."""
    layout: Layout | None = None
    """The layout of the step; None if the trainer does not say."""
    step_seconds: PositiveFloat | None = None
    """Duration of the step; None if it was not timed, or its time says nothing (the first step, a checkpoint)."""
    loss: float | None = None
    """Mean training loss, nats per token."""
    noise: NoiseScale | None = None
    """The noise scale after this step; None if nothing was measured yet."""


class MeterLog:
    """Appends steps to a log. A line is written at once and whole, so that a reader may follow."""

    def __init__(self, path: Path) -> None:
        """Open the log, or go on with one that is there. Makes the folder. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        if end := self._file.seek(0, os.SEEK_END):
            self._file.seek(end - 1)
            if self._file.read(1) != b"\n":  # the writer before was killed in the middle of a line
                self._file.write(b"\n")

    def write(self, step: MeterStep) -> None:
        """Append a step."""
        self._file.write(step.model_dump_json(exclude_defaults=True).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_REQUIRED = {name for name, field in MeterStep.model_fields.items() if field.is_required()}


def meter_steps(path: Path) -> Iterator[MeterStep]:
    """The steps in a log, in the order that they were written. Lines that are no steps are left out: a torn last line,
    and lines that a trainer adds for itself. Raises OSError, and ValueError with the number of the line for a step
    that cannot be."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield MeterStep.model_validate_json(line)
            except ValidationError as error:
                if _is_step(line):
                    raise ValueError(f"line {number}: {first_message(error)}") from None


def _is_step(line: bytes) -> bool:
    """Whether a line has all that a step must have, whatever the values are."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.keys() >= _REQUIRED
