"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) as something to look at, not as an end in the middle of things."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

STDOUT, STDERR = 1, 2
"""File descriptors."""


class Interrupts:
    """While it is entered, SIGINT, SIGTERM and SIGHUP are counted and do nothing else. `nohup` still ignores SIGHUP."""

    def __init__(self) -> None:
        self.count = 0
        """Signals seen."""
        self.signal: int | None = None
        """The first one: the exit code is 128 + this."""
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> "Interrupts":
        self._terminals = [number for number in (STDOUT, STDERR) if os.isatty(number)]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._let_go_of_terminals()
            if self.count:  # a terminal that goes sends it twice, and nobody asked twice
                return
        self.count += 1
        self.signal = self.signal or number

    def _let_go_of_terminals(self) -> None:
        """Write to nowhere instead of to a terminal that is gone: it would be an error in the middle of things."""
        gone = [number for number in self._terminals if not os.isatty(number)]
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for number in gone:
                os.dup2(nowhere, number)
            os.close(nowhere)
