"""In which order a blend takes sequences from its datasets: a function of the weights and the place alone."""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 100_000
"""Weights are whole numbers that add up to at most this: exact if they have few digits, else to five."""


class Blend:
    """Takes sample after sample from the dataset that is furthest behind its share, as Megatron's blend does.

    After n samples each dataset has had its share of n to within one sample, at every n (the largest deficit goes
    first). With whole weights the order repeats after their sum, so that the place of any sample is looked up in one
    period, and nothing has to be written down for a long run.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights` are positive, in any scale. Raises ValueError if they are not."""
        if not weights or any(not 0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights have to be positive numbers, got {list(weights)}")
        self.weights = _whole(weights)
        """The shares in a period, whole numbers."""
        self.period = sum(self.weights)
        """Samples after which the order repeats."""
        self._dataset, self._before = _period(self.weights)

    def locate(self, sample: int) -> tuple[int, int]:
        """The dataset of a sample, and which of the samples of that dataset it is."""
        periods, place = divmod(sample, self.period)
        dataset = int(self._dataset[place])
        return dataset, periods * self.weights[dataset] + int(self._before[place])

    def taken(self, samples: int) -> list[int]:
        """How many samples the first `samples` take from each dataset."""
        periods, rest = divmod(samples, self.period)
        counts = np.bincount(self._dataset[:rest], minlength=len(self.weights))
        return [periods * weight + int(count) for weight, count in zip(self.weights, counts, strict=True)]


def _whole(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers without a common divisor: as they are written if that is short, else rounded."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    if total > LONGEST_PERIOD:
        whole = [max(1, round(weight * LONGEST_PERIOD / total)) for weight in whole]
    return tuple(whole)


@functools.lru_cache(maxsize=8)
def _period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each place in a period: the dataset, and how many samples of it came before."""
    period = sum(weights)
    shares = np.array(weights, np.int64)
    deficits = np.zeros(len(weights), np.int64)
    counts = np.zeros(len(weights), np.int64)
    dataset, before = np.empty(period, np.int32), np.empty(period, np.int64)
    for place in range(period):
        deficits += shares
        chosen = int(deficits.argmax())
        dataset[place], before[place] = chosen, counts[chosen]
        deficits[chosen] -= period
        counts[chosen] += 1
    return dataset, before
