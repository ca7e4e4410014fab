"""Whether somebody asked the workers of a run to stop."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil

AGENT = "COPUS_AGENT"
"""Environment variable with the process id of the agent, by which its workers can tell that it is dead already."""


class StopRequest:
    """True once there was a signal to this process, the agent died or, on rank 0, there is the file `RUN/stop`."""

    def __init__(self, run: Path) -> None:
        """Takes SIGTERM and SIGINT over."""
        # The vote of one rank stops all: only the first asks the file system, which all share, at every step.
        self._file = run / "stop" if os.environ.get("RANK", "0") == "0" else None
        self._parent = os.getppid()
        self._is_orphan = AGENT in os.environ and int(os.environ[AGENT]) not in _ancestors()
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        is_orphan = self._is_orphan or os.getppid() != self._parent
        return self._signalled or is_orphan or (self._file is not None and self._file.exists())


def _ancestors() -> set[int]:
    """Process ids of what started this process, directly or not: PYTHON_EXEC may name a program that starts Python."""
    return {process.pid for process in psutil.Process().parents()}
