"""What a decision says to people of the rest of the job: what moving saves, and what is at stake while φ is unsure."""

from typing import NamedTuple

import numpy as np

from planner.forecast import QUANTILE_90
from planner.menu import Floats
from planner.remaining import stage_seconds
from planner.situation import Situation

QUANTILE_50 = 0.67
"""Standard errors from the middle to the ends of a 50 % interval."""


class Outlook(NamedTuple):
    """The rest of the job as it is expected, for the first run of a situation with C candidates. The intervals of φ
    include the error of c, which the rule itself leaves out (`planner.policies.goodput`)."""

    saved_low: Floats
    """Seconds that moving to each candidate and staying there saves over staying, the move paid, shape (C,): at the
    pessimistic ends of the 50 % intervals of φ and of throughputs."""
    saved_expected: Floats
    """The same in the middle."""
    saved_high: Floats
    """The same at the optimistic ends."""
    seconds_left: float
    """Expected seconds to the end of the job if it stays."""
    critical_batch_low: float
    """Lower end of φ's 90 % interval, sequences."""
    critical_batch_high: float
    """Upper end."""
    regret_bound: float
    """Share of the time left that is lost at most if φ lies within that interval and its forecast is followed as it is,
    beside the best configurations for the φ that is true. Moves count for nothing here."""


def look_ahead(now: Situation) -> Outlook:
    """The outlook of the first run of a situation."""
    sigmas = (-QUANTILE_90, -QUANTILE_50, 0.0, QUANTILE_50, QUANTILE_90)
    stages = stage_seconds(now, sigmas, with_common_error=True)[:, :, 0]
    here = int(now.current[0])
    costs = now.menu.move_seconds(now.current, now.move_seconds)[0]
    error = np.exp(QUANTILE_50 * error_beside_current(now)[0])
    seconds = stages.sum(axis=0)
    slow, middle, fast = (seconds[1:4, here, None] - costs - seconds[1:4] * by for by in (error, 1.0, 1 / error))
    followed = np.take_along_axis(stages, stages[:, 2].argmin(axis=1)[:, None, None], axis=2)[..., 0].sum(axis=0)
    at_best = stages.min(axis=2).sum(axis=0)
    low, expected, high = (now.forecast.at(now.samples_consumed, by)[0] for by in (-QUANTILE_90, 0.0, QUANTILE_90))
    return Outlook(
        saved_low=slow.min(axis=0),
        saved_expected=middle[1],
        saved_high=fast.max(axis=0),
        seconds_left=float(seconds[2, here]),
        critical_batch_low=float(now.critical_batch[0] * low / expected),
        critical_batch_high=float(now.critical_batch[0] * high / expected),
        regret_bound=float(np.max(1 - at_best / followed)),
    )


def error_beside_current(now: Situation) -> Floats:
    """Relative standard error of the ratio of each candidate's time to that of what runs, shape (R, C)."""
    own = np.take_along_axis(now.throughput_error, now.current[:, None], 1)
    other = np.arange(len(now.menu)) != now.current[:, None]
    return np.where(other, np.hypot(now.throughput_error, own), 0.0)
