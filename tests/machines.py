"""Synthetic machines whose true step times are known: still ones, ones that drift, ones that something else uses."""

import math

import numpy as np
from numpy.typing import NDArray

TICK_SECONDS = 0.1


def slowdown(kind: str, rng: np.random.Generator, seconds: float) -> NDArray[np.float64]:
    """Logarithm of how much longer everything takes, every `TICK_SECONDS`.

    drifting: by 10 % either way, correlated over a minute. bursty: half of the time a tenant makes it 1.6 times as
    slow, for 10 s on average.
    """
    ticks = int(seconds / TICK_SECONDS)
    found = np.zeros(ticks)
    if kind == "drifting":
        keep = math.exp(-TICK_SECONDS / 60)
        for tick in range(1, ticks):
            found[tick] = keep * found[tick - 1] + 0.1 * math.sqrt(1 - keep**2) * rng.normal()
    if kind == "bursty":
        tick, busy = 0, bool(rng.integers(2))
        while tick < ticks:
            length = 1 + int(rng.exponential(10.0) / TICK_SECONDS)
            found[tick : tick + length] = busy * math.log(1.6)
            tick, busy = tick + length, not busy
    return found


class Machine:
    """Runs steps of configurations whose ideal times are given."""

    def __init__(self, kind: str, rng: np.random.Generator, noise: float = 0.04, seconds: float = 600.0) -> None:
        """`noise` is the standard deviation of a step's logarithm; one step in a hundred meets a pause."""
        self.rng, self._noise = rng, noise
        self._slowdown = slowdown(kind, rng, seconds)
        self._clock = 0.0

    def step(self, ideal_seconds: float) -> float:
        """Duration of one step, now."""
        tick = int(self._clock / TICK_SECONDS) % len(self._slowdown)
        noise = self._noise * self.rng.standard_t(4) / math.sqrt(2) + 1.5 * (self.rng.random() < 0.01)
        seconds = ideal_seconds * math.exp(self._slowdown[tick] + noise)
        self._clock += seconds
        return float(seconds)

    def wait(self, seconds: float) -> None:
        """Let time pass: a move, a checkpoint."""
        self._clock += seconds
