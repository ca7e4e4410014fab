"""Following the events of a run while they are written."""

from pathlib import Path

from copus.event_lines import kind_of
from copus.events import Event, parse_event


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
        kind = kind_of(line)
        if kind != "decision" or following != "decision":
            kept.append(line)
        if kind in ("decision", "reconfigure"):
            following = kind
    return kept[::-1]
