"""90 % intervals of a mean of few values, by Student's t: of seeds, mostly."""

import math
from collections.abc import Sequence
from statistics import mean, stdev


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    width = float(stdtrit(len(values) - 1, 0.95)) * stdev(values) / math.sqrt(len(values))
    return mean(values) - width, mean(values) + width


def interval_of_ratio(values: Sequence[float]) -> tuple[float, float] | None:
    """Of the geometric mean of times, rates and the like; None for fewer than two values."""
    ends = interval([math.log(value) for value in values])
    return None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))
