"""How the averages forget: a clock that counts half-lives, and blocks of steps on that clock."""

import math
from typing import Any

import numpy as np

from planner.sampling import HalfLife

BLOCKS_PER_HALF_LIFE = 16
"""A block spans so small a part of a half-life. A single step that is longer is a block of its own."""
HALF_LIVES_KEPT = 6
"""Older blocks weigh less than 1.6 % of a new one."""
POWER = 2
"""Early in a run, step s of t weighs (s/t)²: the gradient changes within the first steps by as much as later within
thousands, so no fixed memory fits both ends."""


class Clock:
    """Measures the age of a run in half-lives of its averages.

    A step of B sequences advances it by B ÷ the half-life at that batch. While that half-life is a large part of the
    run so far, the clock advances faster: by POWER·log₂((n + 1)/n) at step n, which makes the weight of a step the
    square of its number. A step therefore never ages the memory by more than its share of the steps, however large its
    batch.
    """

    def __init__(self, half_life: HalfLife) -> None:
        self._half_life = half_life
        self._steps = 0
        self.before = 0.0
        """Half-lives at the beginning of the last step."""
        self.now = 0.0
        """Half-lives at its end."""

    def tick(self, global_batch: int) -> None:
        """Count a step, measured or not."""
        self.before = self.now
        if self._steps:
            young = POWER * math.log2((self._steps + 1) / self._steps)
            self.now += max(young, global_batch / self._half_life.at(global_batch))
        self._steps += 1

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {"steps": self._steps, "now": self.now}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave. The half-life may be another one since."""
        self._steps = state["steps"]
        self.before = self.now = state["now"]


class Blocks:
    """Sums over consecutive measured steps, kept for as long as they weigh anything.

    A block that ended `a` half-lives before the newest one weighs 2^(−a). Blocks rather than steps, because
    neighbouring steps are correlated, and the spread of blocks shows the error of their mean all the same.
    """

    def __init__(self, columns: int, half_lives: float = 1.0) -> None:
        """Sums of `columns` figures, with a memory of so many half-lives of the clock."""
        self._columns = columns
        self._half_lives = half_lives
        self._rows: list[list[float]] = []  # the clock where the block begins and where it ends, then the sums

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, clock: Clock, figures: list[float]) -> None:
        """Add the figures of the step that the clock has just counted."""
        assert len(figures) == self._columns
        span = self._half_lives / BLOCKS_PER_HALF_LIFE
        if not self._rows or clock.now - self._rows[-1][0] > span:
            oldest = clock.now - HALF_LIVES_KEPT * self._half_lives
            self._rows = [row for row in self._rows if row[1] > oldest]
            self._rows.append([clock.before, clock.now, *figures])
            return
        row = self._rows[-1]
        self._rows[-1] = [row[0], clock.now, *(a + b for a, b in zip(row[2:], figures, strict=True))]

    def weighted(self) -> np.ndarray:
        """The sums, each block times its weight; shape (columns, blocks)."""
        rows = np.array(self._rows).reshape(-1, 2 + self._columns)
        decay = 0.5 ** ((rows[-1, 1] - rows[:, 1]) / self._half_lives)
        return (decay[:, None] * rows[:, 2:]).T

    def state(self) -> list[list[float]]:
        """Everything, as plain values for a checkpoint."""
        return self._rows

    def restore(self, rows: list[list[float]]) -> None:
        """Take up what `state` gave."""
        self._rows = [list(row) for row in rows]
