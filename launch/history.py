"""A whole run, read once: what happened, by tokens and by time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from copus.event_lines import done_again, read_decision
from copus.events import (
    Checkpoint,
    DecisionTaken,
    End,
    Evaluate,
    Event,
    Failure,
    Noise,
    Profile,
    Reconfigure,
    Restart,
    Start,
    Step,
    Trial,
    Warned,
    read_events,
)
from launch.status import RunStatus
from launch.wording import describe_event, describe_move
from profiles.configuration import Configuration
from profiles.decision import Decision

PauseKind = Literal["measuring", "starting", "evaluating", "moving", "checkpoints", "planning", "down"]


class StepAt(NamedTuple):
    """A step that counts, when it had ended."""

    tokens: float
    seconds: float
    loss: float | None
    duration: float
    batch: int
    span: int
    """Number of the span that it ran in."""
    lr: float = 0.0
    beta2: float | None = None
    """None with an optimizer that keeps no average of squared gradients."""
    grad_norm: float | None = None
    """Before clipping; None if it was not finite."""
    expert_imbalance: float | None = None
    """As in the event; None for a dense model."""
    dropped_share: float | None = None
    """As in the event; None for a dense model."""


class NoiseAt(NamedTuple):
    """A known noise scale and its interval, sequences."""

    tokens: float
    seconds: float
    value: float
    low: float | None
    high: float | None
    """None if it is unbounded."""


class LossAt(NamedTuple):
    """A held-out loss, nats per token."""

    tokens: float
    seconds: float
    loss: float


class MoveAt(NamedTuple):
    """A move, when it was over."""

    tokens: float
    seconds: float
    event: Reconfigure
    span: int
    """Number of the span that it began."""


class TrialAt(NamedTuple):
    """A trial, when it was over."""

    tokens: float
    seconds: float
    event: Trial


class Pause(NamedTuple):
    """Time in which no step ran."""

    kind: PauseKind
    begin: float
    end: float
    text: str


class Notice(NamedTuple):
    """Something that went wrong, or might have."""

    tokens: float
    seconds: float
    text: str


@dataclass
class Span:
    """A stretch of the run in one configuration; from and to, in tokens and in seconds."""

    configuration: Configuration
    first_tokens: float
    first_seconds: float
    last_tokens: float
    last_seconds: float


@dataclass
class History:
    """What counts, in order. Seconds are since training first began, less the time between a stop and its resume.

    What a restart went back behind is left out, but for the time that it took.
    """

    run: Path
    status: RunStatus = field(default_factory=RunStatus)
    first_start: Start | None = None
    steps: list[StepAt] = field(default_factory=list)
    noise: list[NoiseAt] = field(default_factory=list)
    evaluations: list[LossAt] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    moves: list[MoveAt] = field(default_factory=list)
    """Lasting ones: those of trials are here only if the job stayed."""
    trials: list[TrialAt] = field(default_factory=list)
    trying: MoveAt | None = None
    """The newest move for a trial that has not ended."""
    pauses: list[Pause] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    measured: list[Profile] = field(default_factory=list)
    """What the profiler of this run measured."""
    repeated_seconds: float = 0.0
    """Time of steps that were done again after a restart."""
    begin: float = 0.0
    """When the first event was written, in seconds of the run: negative where something was measured before."""
    end: float = 0.0
    """When the last one was."""
    decisions: dict[int, DecisionTaken] = field(default_factory=dict)
    """Every decision by its number, without its candidates."""

    @property
    def seq_len(self) -> int:
        """Tokens in a sequence; 1 before the first `start`."""
        return self.first_start.seq_len if self.first_start else 1

    @property
    def tokens(self) -> float:
        """Tokens trained on."""
        return self.status.samples_consumed * self.seq_len

    def decision(self, number: int) -> Decision | None:
        """A whole decision by its number; None if it cannot be read."""
        taken = self.decisions.get(number)
        made = read_decision(self.run, taken) if taken else None
        return made.decision if made else None

    def layouts(self) -> list[str]:
        """Labels of the layouts that ran, in the order in which the run came to them."""
        return list(dict.fromkeys(span.configuration.layout.label for span in self.spans))


def read_history(run: Path, events: Sequence[Event] | None = None) -> History:
    """Read the log of a run, unless its `events` were read already. Torn lines and unknown events are passed over;
    without a log everything is empty."""
    history = History(run)
    events = list(read_events(run)) if events is None else events
    history.status.update(events)
    history.first_start = next((event for event in events if isinstance(event, Start)), None)
    sessions = _sessions(events)
    clock = _clock(events, sessions)
    if clock:
        history.begin, history.end = clock[0], max(clock)
    _add_pauses(history, events, clock, sessions)
    lost = done_again(events)
    for place, (event, seconds) in enumerate(zip(events, clock, strict=True)):
        if place not in lost:
            _take(history, event, seconds)
        elif isinstance(event, Step):
            history.repeated_seconds += event.seconds
    if history.spans:
        _end_span(history, history.tokens, history.end)
    return history


def _sessions(events: Sequence[Event]) -> list[int]:
    """Where the workers were launched by a person, again: after an end, or by a resume (which may measure first)."""
    places = [place for place in range(1, len(events)) if isinstance(events[place - 1], End)]
    for place, event in enumerate(events):
        if isinstance(event, Restart) and event.attempt == 0 and not event.requeued:
            while place > 0 and isinstance(events[place - 1], Profile):
                place -= 1
            if place > 0 and place not in places:
                places.append(place)
    return sorted(places)


def _clock(events: Sequence[Event], sessions: list[int]) -> list[float]:
    """Seconds of the run for each event, 0 at the first `start`. Between two sessions the clock stands still, and so it
    does for an event that comes before the one before it: the machine's clock was set back."""
    away, again, clock = 0.0, set(sessions), list[float]()
    for place, event in enumerate(events):
        passed = event.time - events[place - 1].time if place else 0.0
        if place in again or passed < 0:
            away += passed
        clock.append(event.time - away)
    origin = next((clock[place] for place, event in enumerate(events) if isinstance(event, Start)), None)
    origin = clock[0] if origin is None and clock else origin
    return [seconds - (origin or 0.0) for seconds in clock]


def _add_pauses(history: History, events: Sequence[Event], clock: list[float], sessions: list[int]) -> None:
    again, began, measured = set(sessions), clock[0] if clock else 0.0, False
    worked: float | None = None  # when this session was last heard of, once it had trained
    for place, (event, seconds) in enumerate(zip(events, clock, strict=True)):
        if place in again:
            began, measured, worked = seconds, False, None

        def add(kind: PauseKind, begin: float, text: str, end: float = seconds) -> None:
            history.pauses.append(Pause(kind, begin, end, text))

        match event:
            case Profile():
                measured = True
                continue
            case Restart():
                continue
            case Start():
                if worked is not None:
                    add("down", worked, "workers were started again after a failure")
                elif seconds > began:
                    add("measuring" if measured else "starting", began, "before training")
            case Evaluate():
                add("evaluating", seconds - event.seconds, f"held-out loss of {event.sequences} sequences")
            case Reconfigure():
                add("moving", seconds - event.seconds, describe_move(event))
            case Checkpoint():
                add("checkpoints", seconds - event.seconds, event.path)
            case DecisionTaken():
                add("planning", seconds - event.seconds, f"decision {event.number}")
        if worked is not None or isinstance(event, Start):
            worked = seconds


def _take(history: History, event: Event, seconds: float) -> None:
    """What counts of an event."""
    tokens = event.samples_consumed * history.seq_len
    match event:
        case Start():
            _begin_span(history, event.configuration, tokens, seconds)
        case Profile():
            history.measured.append(event)
        case Step():
            span = len(history.spans) - 1
            row = StepAt(tokens, seconds, event.loss, event.seconds, event.global_batch, span)
            row = row._replace(expert_imbalance=event.expert_imbalance, dropped_share=event.dropped_share)
            history.steps.append(row._replace(lr=event.lr, beta2=event.beta2, grad_norm=event.grad_norm))
            if history.spans:
                _end_span(history, tokens, seconds)
        case Noise() if event.value is not None and event.value > 0:
            history.noise.append(NoiseAt(tokens, seconds, event.value, event.low, event.high))
        case Evaluate() if event.loss is not None:
            history.evaluations.append(LossAt(tokens, seconds, event.loss))
        case Reconfigure():
            if history.spans:
                _end_span(history, tokens, seconds - event.seconds)
            _begin_span(history, event.after, tokens, seconds)
            move = MoveAt(tokens, seconds, event, len(history.spans) - 1)
            if event.trial:
                history.trying = move
            else:
                history.moves.append(move)
        case Trial():
            history.trials.append(TrialAt(tokens, seconds, event))
            if history.trying is not None and event.outcome == "stayed":
                history.moves.append(history.trying)
            history.trying = None
        case DecisionTaken():
            history.decisions[event.number] = event
        case Failure() | Restart() | Warned():
            history.notices.append(Notice(tokens, seconds, describe_event(event) or ""))


def _begin_span(history: History, configuration: Configuration, tokens: float, seconds: float) -> None:
    """A resume in the same configuration goes on with its span."""
    if not history.spans or history.spans[-1].configuration != configuration:
        history.spans.append(Span(configuration, tokens, seconds, tokens, seconds))


def _end_span(history: History, tokens: float, seconds: float) -> None:
    history.spans[-1].last_tokens, history.spans[-1].last_seconds = tokens, seconds
