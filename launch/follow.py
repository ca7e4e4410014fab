"""Following the events of a run while they are written."""

from pathlib import Path

from copus.events import Event, parse_lines


class Follower:
    """Reads what was appended to `events.jsonl` since it last looked. A torn last line is waited for."""

    def __init__(self, run: Path) -> None:
        self._path = run / "events.jsonl"
        self._offset = 0

    def read(self) -> list[Event]:
        """The new events, in order."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                appended = file.read()
        except FileNotFoundError:
            return []
        whole = appended[: appended.rfind(b"\n") + 1]
        events = list(parse_lines(whole.splitlines(keepends=True), self._offset))
        self._offset += len(whole)
        return events
