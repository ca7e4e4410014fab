"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) as something to look at, not as an end in the middle of things."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While it is entered, SIGINT, SIGTERM and SIGHUP are counted and do nothing else. `nohup` still ignores SIGHUP."""

    def __init__(self) -> None:
        self.count = 0
        """Signals seen."""
        self.signal: int | None = None
        """The first one: the exit code is 128 + this."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
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
        if number == signal.SIGHUP and self.count:  # a terminal that goes sends it twice, and nobody asked twice
            return
        self.count += 1
        self.signal = self.signal or number
