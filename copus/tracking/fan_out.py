"""Every tracker of a job, each in a thread of its own, so that none of them can stop or slow training."""

import time
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread

from copus.events import Event
from copus.job import JobConfig
from copus.secret_names import without_secrets
from copus.trackers import make_tracker
from copus.tracking.base import Tracker
from copus.tracking.figures import Figures
from copus.user_errors import one_line

BACKLOG = 2_000
"""Events that a tracker may lie behind before it is given up: minutes to hours without a network."""
CLOSING_SECONDS, FAILED_SECONDS = 30.0, 2.0
"""Time that the trackers have together, at the end, for what they have not sent; and where the workers failed, so that
the restart need not wait for them."""


class FanOut:
    """Sends the figures of events to every tracker of the job. On rank 0."""

    def __init__(self, run: Path, job: JobConfig) -> None:
        self._run, self._job = run, job
        self._figures = Figures()
        self._figures.catch_up(run)
        self._channels: list[_Channel] | None = None

    def write(self, event: Event) -> list[str]:
        """Hand an event on, at once. A line for each tracker that has been switched off since the last call."""
        figures = self._figures.of(event)
        if not figures:
            return []
        if self._channels is None:  # not before: measuring a machine is no run that anybody wants to look at
            self._channels = [
                _Channel(name, make_tracker(name, options), self._run, self._job)
                for name, options in self._job.tracking.items()
            ]
        tokens = event.samples_consumed * self._job.model.seq_len
        return [line for channel in self._channels for line in channel.write(event, tokens, figures)]

    def close(self, failed: bool = False) -> list[str]:
        """Wait, though not for long, until everything is sent. A line for each tracker with which that failed."""
        deadline = time.monotonic() + (FAILED_SECONDS if failed else CLOSING_SECONDS)
        channels = self._channels or []
        for channel in channels:
            channel.end()
        return [line for channel in channels for line in channel.wait(deadline)]


class _Channel:
    """A tracker, its thread, and what it has not written yet."""

    def __init__(self, name: str, tracker: Tracker, run: Path, job: JobConfig) -> None:
        self._name, self._tracker, self._run, self._job = name, tracker, run, job
        self._waiting: Queue[tuple[Event, int, dict[str, float]] | None] = Queue(BACKLOG)
        self._trouble: str | None = None
        self._told = False
        self._thread = Thread(target=self._work, name=f"copus-tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, event: Event, tokens: int, figures: dict[str, float]) -> list[str]:
        if self._trouble is None:
            try:
                self._waiting.put_nowait((event, tokens, figures))
            except Full:
                self._trouble = f"it is {BACKLOG} events behind"
        return self._complaint()

    def end(self) -> None:
        """No more events are to come."""
        with suppress(Full):  # then it has been given up already
            self._waiting.put_nowait(None)

    def wait(self, deadline: float) -> list[str]:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and self._trouble is None:
            self._trouble = "it was not done in time after the end"
        return self._complaint()

    def _complaint(self) -> list[str]:
        if self._trouble is None or self._told:
            return []
        self._told = True
        return [f"tracking.{self._name} is switched off: {without_secrets(self._trouble)}"]

    def _work(self) -> None:
        try:
            self._tracker.start(self._run, self._job)
            while self._trouble is None and (item := self._waiting.get()) is not None:
                self._tracker.write(*item)
        except (Exception, SystemExit) as error:  # a library that gives up must not take the training with it
            self._trouble = one_line(error)
        try:
            self._tracker.close()
        except (Exception, SystemExit) as error:
            self._trouble = self._trouble or one_line(error)
