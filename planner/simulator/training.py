"""What simulated runs train between two decisions, on a machine whose speed wanders, and what they learn of it."""

import numpy as np

from planner.goodput import Objective, progress_per_sample
from planner.menu import Floats, Menu
from planner.simulator.runs import DRAWS, EARLY, KNOWN_STEPS, Runs
from planner.simulator.state import State
from planner.simulator.trajectory import at_progress

LAYOUT_SHARE = 0.25
"""What each layout drifts by besides, as a share of the drift of the machine."""


class Machine:
    """Its speed wanders slowly (`Runs.drift`), and something else takes half of it at times (`Runs.bursts`)."""

    def __init__(self, menu: Menu, runs: Runs) -> None:
        """`runs` are all that are begun."""
        self._steady = not runs.drift and not runs.bursts
        if self._steady:
            return
        layouts = int(menu.layout.max()) + 1
        share = np.array([LAYOUT_SHARE] * layouts + [1.0])
        per_decision = runs.drift / np.sqrt(np.maximum(runs.planned_samples / runs.every_samples, 1.0))
        steps = [np.random.default_rng([s, 2]).normal(size=(DRAWS, layouts + 1)) * share for s in runs.seed.tolist()]
        walks = np.cumsum(np.stack(steps), axis=1) * per_decision[:, None, None]
        self._walks = np.asarray(walks[:, :, :-1] + walks[:, :, -1:])

    def log_speed(self, state: State, number: int) -> Floats | None:
        """Logarithm of how much faster each layout is after decision `number` than at the start, shape (R, layouts);
        None if nothing changes."""
        if self._steady:
            return None
        speed = self._walks[state.row, number % DRAWS]
        if state.runs.bursts:
            draws = [np.random.default_rng([seed, 3, number]).random() for seed in state.runs.seed.tolist()]
            speed = speed - np.log(2) * (np.array(draws) < state.runs.bursts)[:, None]
        return np.asarray(speed)


def advance(
    menu: Menu, state: State, number: int, log_speed: Floats | None, objective: Objective, errors: Floats
) -> np.ndarray:
    """Train from decision `number` to the next, or to the target; which runs reached it, shape (R,). `errors` of the
    noise scale are standard normal, shape (R,)."""
    runs, rows = state.runs, np.arange(len(state.current))
    batch = menu.global_batch[state.current]
    first = number == 0 and runs.first_guess is not None
    length = KNOWN_STEPS * batch if first else state.samples_to_next(menu)
    rate = state.actual[rows, state.current]
    if log_speed is not None:
        rate = rate * np.exp(log_speed[rows, menu.layout[state.current]])
    left = 1 - state.progress
    step, phi, effort = _progress(state, batch, length, objective)
    finished = step >= left
    samples = np.where(finished, left * runs.progress * effort, length)
    if runs.first_guess is not None:
        early = 1.0 if runs.early_error is None else runs.early_error ** np.exp(-(state.progress + step / 2) / EARLY)
        ends = state.samples, state.samples + length
        state.meter.observe(phi * runs.factor_error * early, *ends, batch, runs.planned_samples, errors)
    state.progress = state.progress + np.minimum(step, left)
    state.samples = state.samples + samples
    state.seconds = state.seconds + samples / rate
    state.unseen[rows, state.current] = False
    if state.corrections is not None:
        _learn_throughputs(menu, state, rate, samples / batch)
    return np.asarray(finished)


def _progress(state: State, batch: Floats, length: Floats, objective: Objective) -> tuple[Floats, Floats, Floats]:
    """What `length` sequences make of progress, as a share of the target, which may be more than is left; the mean φ on
    the way; and the sequences that a unit of progress takes. By Simpson's rule, solved by iteration: φ changes little
    within a step."""
    left = 1 - state.progress
    step = np.zeros_like(left)
    for _ in range(3):
        phi, effort = np.zeros_like(left), np.zeros_like(left)
        for place, weight in ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)):
            here = at_progress(state.runs.critical_batch, state.progress + place * np.minimum(step, left))
            phi = phi + weight * here
            effort = effort + weight / progress_per_sample(batch, here, objective)
        step = length / (effort * state.runs.progress)
    return step, phi, effort


def _learn_throughputs(menu: Menu, state: State, rate: Floats, steps: Floats) -> None:
    """Correct what each run believes of throughputs by the steps that it made, at samples a second of `rate`."""
    assert state.corrections is not None
    own = state.table_error
    for row, correction in enumerate(state.corrections):
        current = int(state.current[row])
        running, error = menu.configurations[current], float(own[current])
        count = max(float(steps[row]), 1.0)
        correction.observe(running, 1 / state.table[current], 1 / rate[row], error, count)
        for index, configuration in enumerate(menu.configurations):
            state.believed[row, index] = state.table[index] / correction.factor(configuration)
            beside = correction.error(configuration, float(own[index]), running, error) if index != current else 0.0
            state.error[row, index] = beside
