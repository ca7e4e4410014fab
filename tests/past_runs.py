"""Runs with a known truth: a machine that drifts and bursts, a noise scale that grows, and true step times.

The truth is drawn from what the audit believes of the world (c, errors of the noise scale and of predictions), so that
its intervals have to cover it as often as they say.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.goodput import progress_per_sample
from planner.hindsight import FACTOR_ERROR, PastRun, PredictedTime
from profiles.configuration import Configuration
from profiles.layout import Layout

CONFIGURATIONS = (
    Configuration(layout=Layout(tp=2), micro_batch=1, global_batch=4),
    Configuration(layout=Layout(dp=2), micro_batch=1, global_batch=8),
    Configuration(layout=Layout(dp=2), micro_batch=2, global_batch=16),
    Configuration(layout=Layout(dp=2), micro_batch=4, global_batch=32),
)
STEP_SECONDS = (0.25, 0.40, 0.62, 1.10)
"""Of each, on the machine in its mean state, before a run draws its own."""
MOVE_SECONDS = 0.5
SAMPLES = 8000
NOISE_ERROR = 0.15
PREDICTION_ERROR = 0.10
ADAPTS = ((0.0, 0), (0.1, 1), (0.3, 2), (0.7, 3))
"""Share of the samples from which on a configuration runs."""


class Told(NamedTuple):
    """A run and the truth about it."""

    run: PastRun
    gains: dict[int, float]
    """By the number of a configuration in the run: how much longer it would have taken, percent."""


def past_run(
    seed: int, schedule: Sequence[tuple[float, int]] = ADAPTS, *, drift: float = 0.15, burst: float = 0.5
) -> Told:
    """A run on a machine that slows down and recovers: `drift` is the standard deviation of a process with a memory of
    five minutes, `burst` what another tenant adds who comes and goes every ten seconds (in the logarithm)."""
    rng = np.random.default_rng(seed)
    true_seconds = np.array(STEP_SECONDS) * np.exp(0.1 * rng.standard_normal(4))
    factor = 2 * math.exp(FACTOR_ERROR * rng.standard_normal())
    state, busy, now, done, wander = drift * rng.standard_normal(), rng.random() < 0.5, 0.0, 0, 0.0
    running, since, moves = None, 0, 0
    steps, noise = [], []
    while done < SAMPLES:
        number = [index for share, index in schedule if share <= done / SAMPLES][-1]
        if number != running:
            moves += running is not None
            running, since = number, 0
        length = true_seconds[number]
        keep = math.exp(-length / 300)
        state = state * keep + drift * math.sqrt(1 - keep**2) * rng.standard_normal()
        busy ^= rng.random() < length / 10
        seconds = length * math.exp(state + burst * busy + 0.03 * rng.standard_normal())
        now, since = now + seconds, since + 1
        noise_scale = 6 * 10 ** (done / SAMPLES)
        done += CONFIGURATIONS[number].global_batch
        steps.append((number, CONFIGURATIONS[number].global_batch, seconds, now, since > 2, factor * noise_scale))
        wander = 0.95 * wander + math.sqrt(1 - 0.95**2) * rng.standard_normal()
        if done > 0.05 * SAMPLES:
            noise.append((done, math.log(noise_scale) + NOISE_ERROR * wander, NOISE_ERROR))
    ran, batch, seconds, at, settled, critical_batch = (np.array(column) for column in zip(*steps, strict=True))
    order = list(dict.fromkeys(ran.tolist()))
    order += [number for number in range(4) if number not in order]
    place = {number: column for column, number in enumerate(order)}
    predicted = {}
    for number in set(order) - set(ran.tolist()):
        error = PREDICTION_ERROR * rng.standard_normal()
        ratio = math.log(true_seconds[number] / true_seconds[order[0]]) + error
        predicted[place[number]] = PredictedTime(0, ratio, PREDICTION_ERROR)
    samples, logs, errors = np.array(noise).T
    run = PastRun(
        configurations=[CONFIGURATIONS[number] for number in order],
        configuration=np.array([place[number] for number in ran]),
        batch=batch.astype(float),
        seconds=seconds,
        at=at,
        settled=settled,
        noise_samples=samples,
        noise_log=logs,
        noise_error=errors,
        factor=2.0,
        lost_seconds=moves * MOVE_SECONDS,
        move_seconds=np.array([0.0, 0.0, MOVE_SECONDS]),
        predicted=predicted,
    )
    progress = batch * progress_per_sample(batch, critical_batch)
    slowdown = seconds.sum() / true_seconds[ran].sum()
    gains = {}
    for number, configuration in enumerate(CONFIGURATIONS):
        needed = (progress / progress_per_sample(configuration.global_batch, critical_batch)).sum()
        fixed = slowdown * needed / configuration.global_batch * true_seconds[number]
        gains[place[number]] = 100 * (fixed / run.own_seconds - 1)
    return Told(run, gains)
