"""Where a job ends: when its tokens are used up, or when the held-out loss is expected to reach its target."""

import math
from collections import deque
from itertools import combinations
from statistics import median
from typing import Any

FEWEST = 4
"""Evaluations in the last e-folding of the samples before the target's crossing is forecast."""
KEPT = 64
"""Evaluations looked back on."""


class Horizon:
    """The end of a job in sequences: its length, or the crossing of `training.target_loss` if that is expected sooner.

    The held-out loss of the last e-folding of samples is taken for a straight line in log samples, fitted by the median
    of the slopes of all pairs (Theil 1950, Sen 1968): one odd evaluation changes nothing. Loss curves are power laws,
    which flatten in log samples, so the crossing is forecast somewhat early until it is near.
    """

    def __init__(self, total_samples: int, target_loss: float | None) -> None:
        self._total = total_samples
        self._target = target_loss
        self._evaluations: deque[tuple[int, float]] = deque(maxlen=KEPT)

    def observe(self, samples_consumed: int, loss: float) -> None:
        """Feed every evaluation's held-out loss, in nats per token. One that is not finite is left out."""
        if samples_consumed > 0 and math.isfinite(loss):
            self._evaluations.append((samples_consumed, loss))

    def end(self, samples_consumed: int) -> int:
        """Sequences at the end of the job as it is expected after so many."""
        recent = [
            (math.log(samples), loss) for samples, loss in self._evaluations if samples >= samples_consumed / math.e
        ]
        if self._target is None or len(recent) < FEWEST:
            return self._total
        slope = median((b - a) / (y - x) for (x, a), (y, b) in combinations(recent, 2) if y != x)
        if slope >= 0:
            return self._total
        crossing = median(x + (self._target - loss) / slope for x, loss in recent)
        return max(min(self._total, round(math.exp(min(crossing, 60.0)))), samples_consumed)

    def state(self) -> list[tuple[int, float]]:
        """The evaluations, as plain values for a checkpoint."""
        return list(self._evaluations)

    def restore(self, state: list[Any]) -> None:
        """Take up what `state` gave."""
        self._evaluations.extend((samples, loss) for samples, loss in state)
