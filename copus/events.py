"""The event log of a run: `events.jsonl`, append-only, one JSON object a line.

Every event says when it happened in time, steps and samples. docs/events.md is the schema for people; the classes here
are the schema.
Readers skip types and fields that they do not know, so that a newer run can be looked at with an older command.
"""

import json
import os
import time as clock
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from profiles.configuration import Configuration
from profiles.decision import Decision
from profiles.noise_scale import NoiseScale

SCHEMA_VERSION = 1


class Event(BaseModel):
    """What every event has."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True, defer_build=True)

    type: str
    """Kind of event."""
    schema_version: int = SCHEMA_VERSION
    """Version of this schema."""
    time: float = 0.0
    """Seconds since the epoch."""
    step: int
    """Optimizer steps done so far."""
    samples_consumed: int
    """Sequences trained on so far."""


class Start(Event):
    """Workers are up and about to train (also after a resume)."""

    type: Literal["start"] = "start"
    configuration: Configuration
    """What runs."""
    total_samples: int
    """Length of the run in sequences."""
    seq_len: int
    """Tokens in a sequence."""
    resumed_from: str | None = None
    """Checkpoint that the run goes on from."""
    hardware: str
    """As in the throughput table."""
    software: str
    """As in the throughput table."""


class Profile(Event):
    """Progress of the throughput profiler, one for each measurement."""

    type: Literal["profile"] = "profile"
    configuration: Configuration
    """What was measured."""
    done: int
    """Measurements done, this one included."""
    total: int
    """Measurements planned."""
    step_seconds: float | None
    """Median step; None for a failure."""
    failure: str | None = None
    """Why there is no time."""


class Step(Event):
    """One optimizer step."""

    type: Literal["step"] = "step"
    loss: float | None
    """Mean training loss of the step, nats a token; None where it was not finite."""
    grad_norm: float | None
    """Norm of the gradient before clipping; None where it was not finite."""
    lr: float
    """Learning rate of the step."""
    beta2: float
    """Adam's β2 of the step."""
    seconds: float
    """Duration of the step."""
    global_batch: int
    """Sequences in the step."""
    skipped: bool = False
    """True where the gradient was not finite and the optimizer did nothing."""


class Noise(Event):
    """The noise scale after a step."""

    type: Literal["noise"] = "noise"
    value: float | None
    """B_simple in sequences; None while unknown."""
    low: float | None
    """Lower end of the 90 % interval."""
    high: float | None
    """Upper end of the 90 % interval."""
    noise: NoiseScale
    """All of it."""
    parts: int
    """J, parts that the step was made of; 0 where it gave no information."""
    part_size: int
    """n, sequences in a part."""


class DecisionMade(Event):
    """The planner ran."""

    type: Literal["decision"] = "decision"
    decision: Decision
    """All that it saw and chose."""
    seconds: float
    """How long it thought."""


class Reconfigure(Event):
    """The job moved."""

    type: Literal["reconfigure"] = "reconfigure"
    before: Configuration
    """What ran before."""
    after: Configuration
    """What runs now."""
    rung: Literal["batch", "micro-batch", "layout"]
    """Which rung of the ladder it took: the dearest thing that changed."""
    seconds: float
    """Time without training."""
    bytes_moved: int
    """Bytes of weights and optimizer state that were written and read, or sent."""
    decision: int
    """Number of the decision that asked for it."""


class Evaluate(Event):
    """Held-out loss."""

    type: Literal["evaluate"] = "evaluate"
    loss: float | None
    """Mean loss, nats a token; None where it was not finite."""
    sequences: int
    """Held-out sequences."""
    seconds: float
    """How long it took."""


class Checkpoint(Event):
    """A durable checkpoint was completed."""

    type: Literal["checkpoint"] = "checkpoint"
    path: str
    """Folder, relative to the run directory."""
    seconds: float
    """How long training waited."""
    bytes: int
    """Its size."""


class Warned(Event):
    """Something that somebody should look at; the run goes on."""

    type: Literal["warning"] = "warning"
    message: str
    """What, in one line."""


class Branch(Event):
    """A branch of `copus calibrate` ended: a stretch of training from the checkpoint on, thrown away but for this."""

    type: Literal["branch"] = "branch"
    done: int
    """Branches done, this one included."""
    total: int
    """Branches planned."""
    configuration: Configuration
    """What ran."""
    seed: int
    """Seed of the order of its data."""
    sequences: int
    """Sequences trained on."""
    lr: float
    """Learning rate, constant."""
    first_loss: float | None
    """Held-out loss at the checkpoint, nats a token; None where it was not finite."""
    last_loss: float | None
    """Held-out loss at the end."""
    noise: NoiseScale
    """The noise scale at the checkpoint."""


class Failure(Event):
    """Something went wrong."""

    type: Literal["failure"] = "failure"
    rank: int
    """Where."""
    message: str
    """One line."""


class End(Event):
    """The workers stopped."""

    type: Literal["end"] = "end"
    reason: Literal["finished", "interrupted", "max_minutes"]
    """Why."""
    seconds: float
    """Since `start`."""


KINDS: dict[str, type[Event]] = {
    kind.model_fields["type"].default: kind
    for kind in (
        Start,
        Profile,
        Step,
        Noise,
        DecisionMade,
        Reconfigure,
        Evaluate,
        Checkpoint,
        Warned,
        Branch,
        Failure,
        End,
    )
}


class EventLog:
    """Appends events to a run's `events.jsonl`. One writer: rank 0."""

    def __init__(self, run: Path) -> None:
        self._file = open(run / "events.jsonl", "a+b", buffering=0)  # noqa: SIM115 (lives as long as the run)
        if self._file.tell() and os.pread(self._file.fileno(), 1, self._file.tell() - 1) != b"\n":
            self._file.write(b"\n")  # the writer before died in the middle of a line: do not lose this one with it

    def write(self, event: Event) -> Event:
        """Stamp the event with the time and append it, in one write, so that a reader never sees half of it. The
        stamped event."""
        stamped = event.model_copy(update={"time": clock.time()})
        self._file.write(stamped.model_dump_json().encode() + b"\n")
        return stamped

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_events(run: Path) -> Iterator[Event]:
    """The events of a run, in order. Unknown types and a torn last line are skipped."""
    path = run / "events.jsonl"
    if not path.exists():
        return
    with open(path, "rb") as lines:
        for line in lines:
            event = parse_event(line)
            if event is not None:
                yield event


def parse_event(line: bytes) -> Event | None:
    """One line of `events.jsonl`; None for a torn line, or for a type or a value that this version does not know."""
    try:
        values: dict[str, Any] = json.loads(line)
        return KINDS[values["type"]].model_validate(values)
    except (ValueError, KeyError, TypeError):  # pydantic's ValidationError is a ValueError
        return None
