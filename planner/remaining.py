"""The rest of a job in stretches, and how long each of them would take in every configuration."""

import numpy as np

from planner.goodput import progress_per_sample
from planner.menu import Floats
from planner.situation import Situation

STAGES = 12
"""Stretches that the rest of the job is cut into: the first lasts to the next decision, the others grow."""


def stage_seconds(now: Situation, sigmas: tuple[float, ...], *, with_common_error: bool) -> Floats:
    """Seconds of each candidate for each stretch of what is left, shape (K, S, R, C), for φ so many standard errors of
    its forecast up or down, with or without the error of c in them.

    The samples of a stretch are those of the batch that is best in it; every candidate has to make as much progress.
    """
    first = now.samples_to_next
    left = np.maximum(now.samples_left, first * 1.001)
    grown = first[:, None] * (left / first)[:, None] ** np.linspace(0, 1, STAGES)
    edges = np.concatenate([np.zeros((len(left), 1)), grown], axis=1)
    middles, lengths = (edges[:, 1:] + edges[:, :-1]) / 2, np.diff(edges, axis=1)
    where = now.samples_consumed[:, None] + middles
    phi = np.stack([now.forecast.at(where, by, with_common_error=with_common_error) for by in sigmas])
    batch = now.menu.global_batch
    stages = []
    for k in range(STAGES):
        rate = now.goodput(phi[:, :, k])
        best = batch[rate.argmax(axis=2)]
        progress = lengths[:, k] * progress_per_sample(best, phi[:, :, k], now.objective)
        stages.append(progress[..., None] / rate)
    return np.stack(stages)
