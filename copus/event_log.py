"""Writing the event log of a run: what is appended survives a writer that dies, and a full disk ends no training."""

import contextlib
import os
import sys
import time as clock
from pathlib import Path

from copus.events import Checkpoint, DecisionMade, DecisionTaken, Event
from copus.fencing import end_if_replaced


class EventLog:
    """Appends events to a run's `events.jsonl`, and whole decisions to its `decisions.jsonl`. One writer: rank 0."""

    def __init__(self, run: Path) -> None:
        self._events = _AppendedFile(run / "events.jsonl")
        self._run = run
        self._decisions: _AppendedFile | None = None

    def write(self, event: Event) -> Event:
        """Stamp the event with the time and append it, in one write, so that a reader never sees half of it. Returns
        the stamped event.

        If the disk is full the event is lost, and training is not: one line on stderr says so.
        """
        end_if_replaced(self._run)
        stamped = event.model_copy(update={"time": clock.time()})
        self._events.append(self._taken(stamped) if isinstance(stamped, DecisionMade) else stamped)
        if isinstance(event, Checkpoint):  # what a resume starts from must not be ahead of the log
            self._flush()
        return stamped

    def _taken(self, made: DecisionMade) -> DecisionTaken:
        """Write the whole decision first, so that whoever reads of it in the log can read it."""
        self._decisions = self._decisions or _AppendedFile(self._run / "decisions.jsonl")
        return _outcome(made).model_copy(update={"offset": self._decisions.append(made)})

    def _flush(self) -> None:
        for file in (self._decisions, self._events):
            if file is not None:
                file.flush()

    def close(self) -> None:
        """Flush to disk and close."""
        self._flush()
        for file in (self._decisions, self._events):
            if file is not None:
                file.close()


class _AppendedFile:
    """A file of events that is only ever appended to, a line in one write."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (lives as long as the run)
        # The writer before may have died in the middle of a line: do not lose the next one with it.
        self._torn = self._size > 0 and os.pread(self._file.fileno(), 1, self._size - 1) != b"\n"
        self._losing = False

    @property
    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def append(self, event: Event) -> int | None:
        """Append a line. Returns the byte at which it begins; None if the disk has not taken all of it."""
        line = b"\n" * self._torn + event.model_dump_json().encode() + b"\n"
        try:
            begin = self._size + self._torn
            written, why = self._file.write(line) or 0, "the disk took only a part of one"
        except OSError as error:
            written, why = 0, str(error.strerror)
        if written == len(line):
            self._torn = self._losing = False
            return begin
        self._torn = self._torn or written > 0
        if not self._losing:
            print(f"copus: {self._file.name}: events are lost: {why}", file=sys.stderr, flush=True)
        self._losing = True
        return None

    def flush(self) -> None:
        """Wait until it is on disk."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close it."""
        self._file.close()


def _outcome(made: DecisionMade) -> DecisionTaken:
    """What the log says of a decision, without the place of its line."""
    decision = made.decision
    return DecisionTaken(
        time=made.time,
        step=made.step,
        samples_consumed=made.samples_consumed,
        number=decision.number,
        policy=decision.policy,
        current=decision.current,
        chosen=decision.chosen,
        trial=decision.trial,
        reason=decision.reason,
        seconds=made.seconds,
    )
