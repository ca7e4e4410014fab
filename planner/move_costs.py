"""What moves have cost this job, by rung of the ladder, and how many there may be."""

import time
from collections import deque
from statistics import median
from typing import Any

import numpy as np

from planner.menu import RUNGS, Floats, Rung

MEMORY = 8
"""Moves of each rung that are looked back on."""
HOUR = 3600.0


class MoveCosts:
    """Seconds of each rung: the median of the last 8 measured, or what the job file expects before the first.

    Also counts the layouts of the last hour, for the limit of the job file.
    """

    def __init__(self, expected_layout_seconds: float, max_layouts_per_hour: int | None) -> None:
        self._expected: dict[Rung, float] = {"batch": 0.0, "micro-batch": 0.0, "layout": expected_layout_seconds}
        self._measured: dict[Rung, deque[float]] = {rung: deque(maxlen=MEMORY) for rung in RUNGS}
        self._limit = max_layouts_per_hour
        self._layouts: list[float] = []

    def observe(self, rung: Rung, seconds: float) -> None:
        """A move was made, and training stood still for so long."""
        self._measured[rung].append(seconds)
        if rung == "layout":
            self._layouts.append(time.monotonic())

    def seconds(self) -> Floats:
        """Cost of a new batch, micro-batch, layout; ascending, shape (3,): a dearer rung includes the cheaper ones."""
        found = [median(self._measured[rung]) if self._measured[rung] else self._expected[rung] for rung in RUNGS]
        return np.maximum.accumulate(np.array(found))

    def refusal(self, rung: Rung) -> str:
        """Why there may be no such move now; empty where there may."""
        if rung != "layout" or self._limit is None:
            return ""
        now = time.monotonic()
        self._layouts = [at for at in self._layouts if now - at < HOUR]
        if len(self._layouts) < self._limit:
            return ""
        return f"limit: {self._limit} layout move{'s' * (self._limit != 1)} an hour"

    def state(self) -> dict[str, Any]:
        """What was measured, as plain values for a checkpoint; hours begin anew."""
        return {rung: list(seconds) for rung, seconds in self._measured.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        for rung in RUNGS:
            self._measured[rung].extend(state.get(rung, ()))
