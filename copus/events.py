"""The event log of a run: `events.jsonl`, append-only, one JSON object a line. Written by `copus.event_log`.

Every event says when it happened in time, steps and samples. docs/events.md is the schema for people; the classes here
are the schema.
Readers skip types and fields that they do not know, so that a newer run can be looked at with an older command.

A decision with all its candidates is a thousand times as long as any other event, and only a few are ever looked at. It
goes into `decisions.jsonl`; the log has its outcome and the place of its line (`DecisionTaken`).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from profiles.audit import Audit
from profiles.configuration import Configuration
from profiles.decision import Decision
from profiles.noise_scale import NoiseScale

SCHEMA_VERSION = 2
"""1: the event `decision` was a `DecisionMade`, candidates included. Such logs are still read."""
REQUEUED = "COPUS_REQUEUED"
"""Environment variable that an engine sets where a scheduler has started the workers again: `Restart.requeued`."""
ATTEMPT = "COPUS_ATTEMPT"
"""Environment variable in which an engine counts the agents that it has started one after the other: from 0 on, added
to the restarts of the newest one in `Restart.attempt`."""


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
    max_minutes: float | None = None
    """Minutes after this event in which training stops by itself; None without such a limit."""
    peak_samples_per_second: float | None = None
    """What the accelerators would do at their rated peak: a throughput over this is the model FLOP utilization (MFU).
    None if no data sheet says it, as for CPU cores."""
    resumed_from: str | None = None
    """Checkpoint that the run goes on from."""
    data: str | None = None
    """Digest of the prepared data: the text on both sides and the tokenizer. None in the log of an older version."""
    backend: str | None = None
    """Name of the backend that trains, as in the job file. None in the log of an older version."""
    network_gbit_per_second: float | None = None
    """Bandwidth of a node's network, in one direction, if the job file has it or a measurement replaced the data
    sheet's."""
    hardware: str
    """As in the throughput table."""
    software: str
    """As in the throughput table."""


NOTHING_TO_SAY = "the profiler has nothing to say of it"
"""Failure of a `Profile` that left no row in the table."""


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
    seconds: float = 0.0
    """What measuring it took, the move to it included."""
    failure: str | None = None
    """Why there is no time."""


class Step(Event):
    """One optimizer step."""

    type: Literal["step"] = "step"
    loss: float | None
    """Mean training loss of the step, nats per token; None if it was not finite."""
    grad_norm: float | None
    """Norm of the gradient before clipping; None if it was not finite."""
    lr: float
    """Learning rate of the step."""
    beta2: float | None
    """β2 of the step; None with an optimizer that keeps no average of squared gradients."""
    seconds: float
    """Duration of the step."""
    global_batch: int
    """Sequences in the step."""
    skipped: bool = False
    """True if the gradient was not finite and the optimizer did nothing."""
    expert_imbalance: float | None = None
    """Tokens of the busiest expert over the mean of its layer, in the layer where that is largest; 1 is even. None for
    a dense model."""
    dropped_share: float | None = None
    """Share of pairs of a token and one of its experts that `model.capacity_factor` cut off. None for a dense model."""


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
    """J, parts that the step was made of; 0 if it gave no information."""
    part_size: int
    """n, sequences in a part."""
    source: str = ""
    """What the step was measured from: microbatch, replica, normlayer, or two of them joined by +."""
    skipped: int = 0
    """Measured steps of the run so far that were left out because a figure was not finite."""
    calibration: float | None = None
    """κ, noise scale of the whole gradient over that of the norm layers; None while unknown."""


class DecisionMade(Event):
    """The planner ran. `EventLog` writes this to `decisions.jsonl`, and a `DecisionTaken` to the log."""

    type: Literal["decision"] = "decision"
    decision: Decision
    """All that it saw and chose."""
    seconds: float
    """How long deciding took."""


class DecisionTaken(Event):
    """The planner ran: the outcome, and where the whole decision is. `copus.event_lines.read_decision` reads it."""

    type: Literal["decision"] = "decision"
    number: int
    """Counts the decisions of a run, from 0."""
    policy: str
    """Which policy decided."""
    current: Configuration
    """What was running."""
    chosen: Configuration
    """What runs from now on; equal to `current` if nothing changes."""
    trial: bool = False
    """True if `chosen` is only tried."""
    reason: str
    """One sentence for people."""
    seconds: float
    """How long deciding took."""
    file: Literal["decisions.jsonl", "events.jsonl"] = "decisions.jsonl"
    """File with the whole decision; `events.jsonl` for logs of schema version 1, whose line is the whole decision."""
    offset: int | None = None
    """Byte of that file at which the line of the decision begins; None if the disk was full."""

    @property
    def switch(self) -> bool:
        """Whether the job has to move."""
        return self.chosen != self.current


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
    peak_bytes: int | None = None
    """Most memory that any rank used meanwhile; None if nothing moved, or the system does not tell."""
    phases: dict[str, float] = Field(default_factory=dict)
    """Seconds of each phase of a move to another layout, on rank 0."""
    trial: bool = False
    """True for a move to a configuration that is only tried, and for the move back from it."""


class Trial(Event):
    """A trial ended: a few steps in a configuration that never ran, timed beside the one that runs."""

    type: Literal["trial"] = "trial"
    candidate: Configuration
    """The configuration that was tried."""
    running: Configuration
    """The configuration that ran before, and runs again unless the job stayed."""
    steps: int
    """Optimizer steps from the move there to the end of the trial; the job trained in all of them."""
    seconds: float
    """Duration of these steps and of the moves between them."""
    move_seconds: float
    """The share of `seconds` in which training stood still."""
    ratio: float | None
    """Step time of the candidate over that of the running configuration; None if no step was timed."""
    ratio_low: float | None
    """Lower end of the 90 % interval of `ratio`."""
    ratio_high: float | None
    """Upper end of the 90 % interval of `ratio`."""
    outcome: Literal["stayed", "returned"]
    """Whether the job stays in the candidate or went back to the running configuration."""
    decision: int
    """Number of the decision that asked for the trial."""


class Evaluate(Event):
    """Held-out loss."""

    type: Literal["evaluate"] = "evaluate"
    loss: float | None
    """Mean loss, nats per token; None if it was not finite."""
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
    background_seconds: float = 0.0
    """How long it was being written while training went on."""
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
    """Held-out loss at the checkpoint, nats per token; None if it was not finite."""
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
    user_error: bool = False
    """True if only the user can fix it: the workers are not started again."""
    fatal: bool = True
    """False if the job goes on: a move was taken back, memory ran out after one and the job moved back, a checkpoint
    was skipped or could not be written."""


class Restart(Event):
    """Workers are up again after a failure or a stop, and go on from a checkpoint. Comes before the `start`.

    `step` and `samples_consumed` are the checkpoint's. Earlier events with more samples no longer count: what they tell
    of is done again.
    """

    type: Literal["restart"] = "restart"
    attempt: int
    """Times that the elastic agent, or the engine, has restarted the workers since they were submitted; 0 after
    `--resume`."""
    requeued: bool = False
    """Whether a scheduler had started the agent again, after a failure or a preemption: nobody typed `--resume`."""
    resumed_from: str | None
    """Checkpoint that the run goes on from; None for the beginning."""
    samples_repeated: int
    """Sequences trained on before that are trained on again, from the same weights: the log has them twice."""
    ranks: int
    """Ranks that there are now."""


class Audited(Event):
    """The run looked back on itself; comes right before the `end`."""

    type: Literal["audit"] = "audit"
    audit: Audit
    """What it cost and brought; documented field by field in `profiles/audit.py`."""


class End(Event):
    """The workers stopped."""

    type: Literal["end"] = "end"
    reason: Literal["finished", "interrupted", "max_minutes", "target_loss", "diverged"]
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
        DecisionTaken,
        Reconfigure,
        Trial,
        Evaluate,
        Checkpoint,
        Warned,
        Branch,
        Failure,
        Restart,
        Audited,
        End,
    )
}


def read_events(run: Path) -> Iterator[Event]:
    """The events of a run, in order. Unknown types and a torn last line are skipped."""
    path = run / "events.jsonl"
    if not path.exists():
        return
    with open(path, "rb") as lines:
        yield from parse_lines(lines)


def parse_lines(lines: Iterable[bytes], offset: int = 0) -> Iterator[Event]:
    """The events of consecutive lines of `events.jsonl`, with their ends, of which the first begins at byte `offset`.
    Unknown types and a torn last line are skipped."""
    for line in lines:
        event = parse_event(line)
        if isinstance(event, DecisionTaken) and event.file == "events.jsonl":
            event = event.model_copy(update={"offset": offset})
        if event is not None:
            yield event
        offset += len(line)


def samples_trained(run: Path) -> int | None:
    """Sequences trained on by the last step in the log; None if there is none. Reads the end of the log alone."""
    try:
        with open(run / "events.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            length = 1 << 16
            while True:
                file.seek(max(0, size - length))
                for line in reversed(file.read().splitlines()):
                    event = parse_event(line) if b'"step"' in line[:20] else None
                    if isinstance(event, Step):
                        return event.samples_consumed
                if length >= size:
                    return None
                length *= 16
    except FileNotFoundError:
        return None


def has_checkpoint(run: Path) -> bool:
    """Whether a checkpoint was completed since the run last began at its first step."""
    complete = False
    with contextlib.suppress(FileNotFoundError), open(run / "events.jsonl", "rb") as lines:
        for line in lines:
            if b'"checkpoint"' in line[:24]:
                complete = True
            elif b'"start"' in line[:24]:
                event = parse_event(line)
                complete = complete and not (isinstance(event, Start) and event.resumed_from is None)
    return complete


def parse_event(line: bytes) -> Event | None:
    """One line of `events.jsonl`; None for a torn line, or for a type or a value that this version does not know."""
    try:
        values: dict[str, Any] = from_json(line)
        if values["type"] == "decision" and "decision" in values:  # schema version 1
            values = values["decision"] | values | {"file": "events.jsonl"}
        return KINDS[values["type"]].model_validate(values)
    except (ValueError, KeyError, TypeError):  # pydantic's ValidationError is a ValueError
        return None
