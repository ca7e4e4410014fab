"""What simulated runs know of φ: by published laws, by the noise scale that they measure, and by changes of batch."""

from typing import NamedTuple

import numpy as np

from planner.critical_batch_factor import NEAR, SYSTEMATIC
from planner.forecast import LAWS_ERROR, CriticalBatchForecast, law_correction
from planner.menu import Floats, Indices, Menu
from planner.simulator.runs import DRAWS, Runs
from planner.simulator.state import State

LOSS_SLOPE = 0.25
"""Nats a token that the loss falls by in an e-folding of samples: how much a change of batch has to show."""
LOSS_NOISE = 0.5
"""Standard deviation of the loss of a sequence, nats per token (docs/calibration.md)."""


class Estimate(NamedTuple):
    """What R runs know of φ when they decide."""

    critical_batch: Floats
    """φ by the noise scale and the c that was believed at the start, sequences, shape (R,)."""
    samples: Floats
    """Sequences trained on, shape (R,)."""
    forecast: CriticalBatchForecast
    """φ from now on, with what the run has learned of c."""


def normal_errors(runs: Runs) -> Floats:
    """Standard normal errors of estimates, one row a run, equal for equal seeds; shape (R, DRAWS)."""
    rows = {}
    for seed in set(runs.seed.tolist()):
        white = np.random.default_rng([seed, 0]).normal(size=DRAWS)
        if runs.correlation:
            for i in range(1, DRAWS):
                white[i] = runs.correlation * white[i - 1] + np.sqrt(1 - runs.correlation**2) * white[i]
        rows[seed] = white
    return np.stack([rows[seed] for seed in runs.seed.tolist()])


def estimate_critical_batch(state: State, number: int, errors: Floats) -> Estimate:
    """φ as the runs know it at decision `number`; `errors` are standard normal, shape (R,)."""
    if state.runs.first_guess is None:
        return _without_lag(state, errors)
    guess = state.runs.first_guess
    return _by_laws(state, guess) if number == 0 else _by_averages(state, guess)


def _without_lag(state: State, errors: Floats) -> Estimate:
    """One estimate of φ as it is now."""
    runs = state.runs
    seen = state.critical_batch * np.exp(errors * runs.noise) * runs.factor_error
    place = np.maximum(state.samples, runs.every_samples / 2)
    state.forecast.observe(place, seen, np.maximum(runs.noise, 0.01), (1 - runs.correlation) / (1 + runs.correlation))
    return Estimate(seen, place, _with_factor(state))


def _by_laws(state: State, guess: Floats) -> Estimate:
    """What laws say before the first step; `guess` is that over what φ is."""
    return Estimate(state.critical_batch * guess, np.ones_like(guess), _laws(state, guess))


def _laws(state: State, guess: Floats) -> CriticalBatchForecast:
    """φ as laws expect it of the whole job, from where it begins."""
    laws = CriticalBatchForecast.unknown(state.runs.planned_samples)
    laws.observe(np.ones_like(guess), state.runs.critical_batch[:, 0] * guess, np.full_like(guess, LAWS_ERROR))
    return laws


def _by_averages(state: State, guess: Floats) -> Estimate:
    """φ now by the averages, as `Planner` works it out: filed at their centroid, grown since as forecast, and corrected
    by laws."""
    meter, here = state.meter, state.samples
    error = np.sqrt(meter.variance)
    memory = np.maximum(here - meter.centroid, 1e-9)
    repeated = np.where(state.observed_at > 0, np.exp(-np.maximum(here - state.observed_at, 1) / memory), 0.0)
    state.forecast.observe(meter.centroid, meter.average, error, (1 - repeated) / (1 + repeated))
    state.observed_at = here.copy()
    now = meter.average * state.forecast.grown(meter.centroid, here)
    own = np.exp(state.factor_shift)
    shift, left = law_correction(_laws(state, guess).at(here), own * now, error, state.factor_shift_error)
    return Estimate(now, here, state.forecast.scaled(own * np.exp(shift), left))


def _with_factor(state: State) -> CriticalBatchForecast:
    """The forecast with what the run has learned of c."""
    return state.forecast.scaled(np.exp(state.factor_shift), state.factor_shift_error)


def learn_factor(menu: Menu, state: State, index: Indices, true_phi: Floats) -> None:
    """What a change of batch, from what runs to `index`, teaches of c (`planner.critical_batch_factor`)."""
    before, after = menu.global_batch[state.current], menu.global_batch[index]
    changed = before != after
    stretch = np.minimum(NEAR * state.samples, state.samples - state.batch_changed_at)
    told = changed & (stretch > 0) & (state.factor_shift_error > 0)
    if told.any():
        seen, error = _shift_by_slopes(state, before, after, stretch, true_phi)
        gain = np.where(told, state.factor_shift_error**2 / (state.factor_shift_error**2 + error**2), 0.0)
        state.factor_shift = state.factor_shift + gain * (seen - state.factor_shift)
        state.factor_shift_error = state.factor_shift_error * np.sqrt(1 - gain)
    state.batch_changed_at = np.where(changed, state.samples, state.batch_changed_at)


def _shift_by_slopes(
    state: State, before: Floats, after: Floats, stretch: Floats, true_phi: Floats
) -> tuple[Floats, Floats]:
    """log c beyond what was believed, by the slopes of the loss over a stretch of sequences on each side of a change of
    batch, with its standard error: as well as the noise of the loss of all these sequences allows."""
    fall = LOSS_SLOPE * stretch / np.maximum(state.samples, 1)  # nats over the stretch
    slope_error = 4 * np.sqrt(12 / np.maximum(stretch, 1)) * LOSS_NOISE / np.maximum(fall, 1e-9)
    sensitivity = np.abs(after / (true_phi + after) - before / (true_phi + before))
    error = np.hypot(slope_error * np.sqrt(2) / np.maximum(sensitivity, 1e-9), SYSTEMATIC)
    draws = [
        np.random.default_rng([seed, 5, int(at)]).normal()
        for seed, at in zip(state.runs.seed, state.samples, strict=True)
    ]
    return -np.log(state.runs.factor_error) + error * np.array(draws), error
