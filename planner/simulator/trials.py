"""Trials of simulated runs: a few steps of a candidate, beside those of what runs."""

import numpy as np

from planner.goodput import progress_per_sample
from planner.menu import Floats, Indices, Menu
from planner.simulator.state import State
from planner.simulator.trajectory import at_progress
from planner.situation import Choice, Situation
from planner.trials import EXPECTED_STEPS, SETTLING_STEPS

TRIAL_ERROR = 0.03
"""Standard error of the logarithm of the ratio that a trial measures, on a machine with bursts."""


def make_trials(menu: Menu, state: State, choice: Choice, situation: Situation, log_speed: Floats | None) -> Indices:
    """Make the trials that were asked for: there, a few steps, and back unless it was better; what runs then."""
    assert choice.exploring is not None
    assert state.corrections is not None
    index = choice.index.copy()
    worth = situation.goodput(situation.critical_batch) / situation.samples_per_second
    for row in map(int, np.flatnonzero(choice.exploring)):
        pair = candidate, running = int(index[row]), int(state.current[row])
        rates = state.actual[row]
        if log_speed is not None:
            rates = rates * np.exp(log_speed[row, menu.layout])
        log_ratio = _measured(menu, state, row, pair, rates, situation.number)
        _learn(menu, state, row, pair, log_ratio)
        break_even = np.log(menu.global_batch[candidate] * worth[row, candidate])
        break_even -= np.log(menu.global_batch[running] * worth[row, running])
        stays = bool(log_ratio < break_even - 2 * TRIAL_ERROR)
        _spend(menu, state, row, pair, rates, situation, stays)
        if not stays:
            index[row] = running
    return index


def _measured(menu: Menu, state: State, row: int, pair: tuple[int, int], rates: Floats, number: int) -> float:
    """Logarithm of the candidate's step time over that of what runs. The steps are beside each other, so that what
    slows the whole machine is not in it."""
    candidate, running = pair
    batch = menu.global_batch
    exact = float(np.log(batch[candidate] / batch[running] / rates[candidate] * rates[running]))
    return exact + TRIAL_ERROR * float(np.random.default_rng([int(state.runs.seed[row]), 4, number]).normal())


def _learn(menu: Menu, state: State, row: int, pair: tuple[int, int], log_ratio: float) -> None:
    """Correct the table by what was measured, as `Planner.end_trial` does."""
    assert state.corrections is not None
    candidate, running = pair
    step = menu.global_batch / state.table
    off = log_ratio - float(np.log(step[candidate] / step[running]))
    own = float(state.table_error[candidate]), float(state.table_error[running])
    configurations = menu.configurations[candidate], menu.configurations[running]
    state.corrections[row].observe_comparison(*configurations, off, TRIAL_ERROR, own, EXPECTED_STEPS)
    state.unseen[row, menu.passes == menu.passes[candidate]] = False


def _spend(
    menu: Menu, state: State, row: int, pair: tuple[int, int], rates: Floats, situation: Situation, stays: bool
) -> None:
    """Count the steps of a trial, which make progress with the candidate's batch, and its moves."""
    candidate, running = pair
    runs, steps = state.runs, SETTLING_STEPS + EXPECTED_STEPS
    batch = menu.global_batch[candidate]
    move = float(menu.move_seconds(np.array([running]), runs.move_seconds[row])[0, candidate])
    seconds = steps * batch / rates[candidate]
    phi = float(at_progress(runs.critical_batch[row : row + 1], state.progress[row : row + 1])[0])
    made = progress_per_sample(batch, phi, situation.objective) * steps * batch
    state.progress[row] += min(float(made) / float(runs.progress[row]), 1 - state.progress[row])
    state.samples[row] += steps * batch
    state.seconds[row] += seconds + (0.0 if stays else 2 * move)
    state.trial_seconds[row] += seconds + 2 * move + steps * menu.global_batch[running] / rates[running]
    state.trials[row] += 1
