"""Reading the log of a run: decisions one by one, lines that are not validated, and which events still count."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from copus.events import DecisionMade, DecisionTaken, Event, Start


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


def read_decision(run: Path, taken: DecisionTaken) -> DecisionMade | None:
    """The whole decision behind an event of the log. None if it is not there (the disk was full, the file is gone), or
    was written by a version whose decisions this one does not know."""
    if taken.offset is None:
        return None
    try:
        with open(run / taken.file, "rb") as file:
            file.seek(taken.offset)
            made = DecisionMade.model_validate_json(file.readline())
    except (OSError, ValueError):
        return None
    return made if made.decision.number == taken.number else None


class EventLine(NamedTuple):
    """An event that is not validated yet."""

    kind: str
    """Its type."""
    text: bytes
    """The whole line."""


def event_lines(run: Path, *kinds: str) -> Iterator[EventLine]:
    """The lines of these types of a run's log, in order, for readers that want few of them. A torn last line is left
    out."""
    try:
        file = open(run / "events.jsonl", "rb")  # noqa: SIM115 (closed below; a run without events is an empty one)
    except FileNotFoundError:
        return
    with file:
        for text in file:
            kind = _kind_of(text)
            if kind in kinds:
                yield EventLine(kind, text)


def _kind_of(text: bytes) -> str:
    """Type of the event in a line; empty if it has none."""
    match = re.match(rb'\{"type":\s*"([\w-]+)"', text)  # EventLog writes the type first
    if match:
        return match[1].decode()
    try:
        values = json.loads(text)
    except ValueError:
        return ""
    return str(values.get("type", "")) if isinstance(values, dict) else ""
