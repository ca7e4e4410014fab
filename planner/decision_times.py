"""When to decide. A file of its own, since the training loop, the planner and the simulator all ask it."""

import math

FEWEST_STEPS_BETWEEN = 10
"""Steps between two decisions, at least: fewer show nothing new, and all ranks wait for a decision."""
LEAST_SHARE_BETWEEN = 1 / 200
"""Share of all sequences so far that two decisions are apart, at least: the noise scale grows with the logarithm of the
sequences, so decisions in equal ratios miss nothing, and the event log of a long run stays small."""


def decision_interval(samples_consumed: int, global_batch: int, every_samples: int) -> int:
    """Sequences between two decisions: `every_samples`, doubled until these are `FEWEST_STEPS_BETWEEN` steps and
    `LEAST_SHARE_BETWEEN` of the run so far."""
    least = max(FEWEST_STEPS_BETWEEN * global_batch, LEAST_SHARE_BETWEEN * samples_consumed)
    return every_samples * 2 ** max(0, math.ceil(math.log2(least / every_samples)))


def decision_is_due(samples_before: int, samples_consumed: int, global_batch: int, every_samples: int) -> bool:
    """Whether a step that ended at `samples_consumed` crossed a multiple of the interval between decisions. A resumed
    run decides at the same places: nothing has to be remembered for it."""
    interval = decision_interval(samples_consumed, global_batch, every_samples)
    return samples_before // interval < samples_consumed // interval
