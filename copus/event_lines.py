"""Reading the log of a run: its lines before they are validated, and which of its events still count."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from copus.events import DecisionMade, Event, Reconfigure, Start, parse_event


def without_replays(events: Iterable[Event]) -> list[Event]:
    """The history that counts: what a resume went back behind, and did again, is left out.

    A run that dies after its newest checkpoint resumes from there, so the log holds the samples in between twice.
    """
    events = list(events)
    lost = done_again(events)
    return [event for place, event in enumerate(events) if place not in lost]


def done_again(events: Sequence[Event]) -> set[int]:
    """Places of the events that no longer count: those that a later `start` has fewer samples than."""
    lost: set[int] = set()
    for place, event in enumerate(events):
        if isinstance(event, Start):
            lost |= {earlier for earlier in range(place) if events[earlier].samples_consumed > event.samples_consumed}
    return lost


class EventLine(NamedTuple):
    """An event that is not validated yet: a long run's decisions take seconds to validate, and one is wanted."""

    kind: str
    """Its type."""
    text: bytes
    """The whole line."""

    def decision_number(self) -> int | None:
        """Number of the decision, where this is one."""
        match = re.search(rb'"decision":\s*\{"number":\s*(\d+)', self.text)
        if match:
            return int(match[1])
        event = parse_event(self.text)
        return event.decision.number if isinstance(event, DecisionMade) else None


def event_lines(run: Path, *kinds: str) -> Iterator[EventLine]:
    """The lines of these types of a run's log, in order. A torn last line is left out."""
    try:
        file = open(run / "events.jsonl", "rb")  # noqa: SIM115 (closed below; a run without events is an empty one)
    except FileNotFoundError:
        return
    with file:
        for text in file:
            kind = kind_of(text)
            if kind in kinds:
                yield EventLine(kind, text)


class DecisionTaken(Event):
    """A decision without what was decided, which is a thousand times as long as any other event."""

    type: Literal["decision"] = "decision"
    number: int
    """Number of the decision."""
    seconds: float
    """How long it took."""
    line: bytes
    """The whole line of the log; empty if the decision moved nothing and is not the newest."""


ENVELOPE = re.compile(
    rb'(\{"type":.*?),\s*"decision":\s*\{"number":\s*(\d+),.*\},\s*("seconds":[^,{}]+)\}\s*$', re.DOTALL
)
"""The fields of a decision's line before and after the decision itself."""


def read_briefly(run: Path, *kinds: str) -> list[Event]:
    """The events of these types, with a `DecisionTaken` for every decision. Only those that moved the job, and the
    newest, keep their line: a long run has gigabytes of decisions."""
    events: list[Event] = []
    newest: DecisionTaken | None = None
    for line in event_lines(run, *kinds):
        event = _decision_taken(line.text) if line.kind == "decision" else parse_event(line.text)
        if event is None:
            continue
        if isinstance(event, DecisionTaken):
            if newest is not None:
                newest.line = b""
            newest = event
        elif isinstance(event, Reconfigure):
            newest = None
        events.append(event)
    return events


def _decision_taken(text: bytes) -> DecisionTaken | None:
    try:
        if match := ENVELOPE.match(text):
            values = json.loads(match[1] + b"," + match[3] + b"}") | {"number": int(match[2])}
        else:  # another program wrote it
            values = json.loads(text)
            values["number"] = values["decision"]["number"]
        return DecisionTaken.model_validate(values | {"line": text})
    except (ValueError, KeyError, TypeError):
        return None


def samples_of(text: bytes) -> int:
    """Its `samples_consumed`; 0 where it has none."""
    match = re.search(rb'"samples_consumed":\s*(\d+)', text)
    return int(match[1]) if match else 0


def kind_of(text: bytes) -> str:
    """Type of the event in a line; empty where it has none."""
    match = re.match(rb'\{"type":\s*"([\w-]+)"', text)  # EventLog writes the type first
    if match:
        return match[1].decode()
    try:
        values = json.loads(text)
    except ValueError:
        return ""
    return str(values.get("type", "")) if isinstance(values, dict) else ""
