"""Whether somebody asked the workers of a run to stop."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil

LARGER = "hosts\n"
"""In RUN/stop if the workers are to go on with more hosts; the user's stop has nothing in it."""

AGENT = "COPUS_AGENT"
"""Environment variable with the process id of the agent, by which its workers can tell that it is dead already."""


class StopRequest:
    """True once there was a signal to this process, the agent died or, on rank 0, there is the file `RUN/stop`."""

    def __init__(self, run: Path) -> None:
        """Takes SIGTERM and SIGINT over."""
        self._file = run / "stop"
        self._parent = os.getppid()
        self._is_orphan = AGENT in os.environ and int(os.environ[AGENT]) not in _ancestors()
        self._signalled = False
        self.is_for_larger_world = False
        """Whether, on rank 0, the newest answer was for no more than a pause until there are more ranks."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        return self._ends() or self._file_is_there()

    def for_good(self) -> bool:
        """Whether it is more than a request to pause until there are more ranks."""
        return self._ends() or (self._file_is_there() and not self.is_for_larger_world)

    def _ends(self) -> bool:
        return self._signalled or self._is_orphan or os.getppid() != self._parent

    def _file_is_there(self) -> bool:
        if os.environ.get("RANK", "0") != "0":  # the vote of one rank stops all, and the file system is slow
            return False
        try:
            self.is_for_larger_world = self._file.read_text() == LARGER
        except FileNotFoundError:
            self.is_for_larger_world = False
            return False
        return True


def _ancestors() -> set[int]:
    """Process ids of what started this process, directly or not: PYTHON_EXEC may name a program that starts Python."""
    return {process.pid for process in psutil.Process().parents()}
