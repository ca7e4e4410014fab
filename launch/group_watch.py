"""The queued runs of a group, watched until they have ended."""

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from copus.job import JobError
from launch.conclusion import trained
from launch.engines import Engine, engine_state
from launch.group_results import ENDS
from launch.interrupts import Interrupts
from launch.queued import LOOKS, STATE_SECONDS
from launch.run_state import state_of
from launch.runs import status_of

QUESTION_SECONDS = 0.5
"""Least time between two questions to the scheduler, however many jobs there are."""


class Watch:
    """The queued runs of a group: tells what becomes of them."""

    def __init__(self, queued: Mapping[Path, Engine], total: int, console: Console, fail_fast: bool) -> None:
        """Those that are `queued` already are watched from now on, the others when they are added: `total` in all. With
        `fail_fast` the first failure takes all out of the queue."""
        self.failed: list[str] = []
        """Names of those that failed."""
        self.total = total
        """Runs that are watched, sooner or later."""
        self._console, self._fail_fast = console, fail_fast
        self._waiting = dict(queued)
        self._ended = 0
        self._looks: dict[Path, int] = {}
        self._said: dict[Path, str] = {}

    def add(self, run: Path, engine: Engine) -> None:
        """Watch this one too."""
        self._waiting[run] = engine

    def until(self, at_most: int, interrupts: Interrupts) -> None:
        """Wait until at most so many have not ended, or until an interrupt."""
        while len(self._waiting) > at_most and not interrupts.count:
            pause = max(STATE_SECONDS / len(self._waiting), QUESTION_SECONDS)
            for run in list(self._waiting):
                self._look(run)
                if self.failed and self._fail_fast:
                    self.withdraw()
                    return
                if len(self._waiting) <= at_most or interrupts.count:
                    return
                time.sleep(pause)

    def withdraw(self) -> None:
        """Take those that have not ended out of the queue, and watch no more."""
        for run, engine in self._waiting.items():
            try:
                done = engine.cancel(run, now=False)
            except (JobError, OSError) as error:  # it has just ended; nobody can write there
                done = str(error)
            self._console.print(f"{run.name}: {done}", markup=False, soft_wrap=True)
        self._waiting.clear()

    def _look(self, run: Path) -> None:
        status = status_of(run)
        state = state_of(run, status)
        self._looks[run] = 0 if state.alive else self._looks.get(run, 0) + 1
        if state.alive and self._said.get(run) != state.name:
            self._said[run] = state.name
            self._console.print(f"{run.name}: {state.name}", markup=False, soft_wrap=True)
        if self._looks[run] < LOOKS:
            return
        del self._waiting[run]
        self._ended += 1
        done = f"{self._ended} of {self.total} ended"
        why = f": {state.why}" if state.why else ""
        why += f" ({engine_state(run).words})" if state.name == "crashed" else ""  # nobody else says why
        line = f"{run.name}: {state.name}{why}, {trained(status)} ({done})"
        self._console.print(line, markup=False, soft_wrap=True)
        if status.end is None or status.end.reason not in ENDS:
            self.failed.append(run.name)
