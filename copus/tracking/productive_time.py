"""How much of a run's time went into training."""

from array import array
from bisect import bisect_right

from copus.events import End, Event, Restart, Start, Step


class ProductiveTime:
    """Share of the time since the first `start` that went into steps that still count. Feed it every event, in order.

    Steps that a restart does again no longer count; measuring, moves, evaluations, checkpoints, and the time from a
    crash to the restart never did. The time between a clean end and a resume is nobody's loss, and is left out.
    """

    def __init__(self) -> None:
        self._samples = array("q")
        self._seconds = array("d")
        """Seconds of all steps up to the one after which so many samples had been seen."""
        self._elapsed = 0.0
        self._last: float | None = None

    def add(self, event: Event) -> None:
        """Take the next event into account."""
        if self._last is not None:
            self._elapsed += max(0.0, event.time - self._last)
        if self._last is not None or isinstance(event, Start | Restart):
            self._last = None if isinstance(event, End) else event.time
        if isinstance(event, Start | Restart):
            kept = bisect_right(self._samples, event.samples_consumed)
            del self._samples[kept:], self._seconds[kept:]
        elif isinstance(event, Step):
            self._samples.append(event.samples_consumed)
            self._seconds.append(event.seconds + (self._seconds[-1] if self._seconds else 0.0))

    @property
    def fraction(self) -> float | None:
        """Between 0 and 1; None before any time has passed."""
        if not self._seconds or not self._elapsed:
            return None
        return min(1.0, self._seconds[-1] / self._elapsed)
