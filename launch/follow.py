"""Following the events of a run while they are written."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from copus.events import DecisionMade, Event, Start, parse_event


class Follower:
    """Reads what was appended to `events.jsonl` since it last looked. A torn last line is waited for."""

    def __init__(self, run: Path, *, idle_decisions: bool = True) -> None:
        """Without `idle_decisions`, those that moved nothing are left out once a newer one is there: they are long."""
        self._path = run / "events.jsonl"
        self._offset = 0
        self._idle_decisions = idle_decisions

    def read(self) -> list[Event]:
        """The new events, in order."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                appended = file.read()
        except FileNotFoundError:
            return []
        whole = appended[: appended.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        if not self._idle_decisions:
            lines = _without_idle_decisions(lines)
        return [event for event in map(parse_event, lines) if event is not None]


def _without_idle_decisions(lines: list[bytes]) -> list[bytes]:
    """Without decisions that another decision follows before any move."""
    kept, following = [], ""
    for line in reversed(lines):
        kind = _kind(line)
        if kind != "decision" or following != "decision":
            kept.append(line)
        if kind in ("decision", "reconfigure"):
            following = kind
    return kept[::-1]


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
            kind = _kind(text)
            if kind in kinds:
                yield EventLine(kind, text)


def samples_of(text: bytes) -> int:
    """Its `samples_consumed`; 0 where it has none."""
    match = re.search(rb'"samples_consumed":\s*(\d+)', text)
    return int(match[1]) if match else 0


def _kind(text: bytes) -> str:
    """Type of the event in a line; empty where it has none."""
    match = re.match(rb'\{"type":\s*"([\w-]+)"', text)  # EventLog writes the type first
    if match:
        return match[1].decode()
    try:
        values = json.loads(text)
    except ValueError:
        return ""
    return str(values.get("type", "")) if isinstance(values, dict) else ""
