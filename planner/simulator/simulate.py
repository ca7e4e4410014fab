"""Many runs of a policy at once.

`simulate` is the way through this package:

    what is simulated, and the outcome   `planner.simulator.runs`, with φ of `planner.simulator.trajectory`
    what the runs know of φ              `planner.simulator.estimates`, from a `planner.simulator.meter`
    what they decide                     a policy, which sees a `planner.situation` as in a job
    the trials of these decisions        `planner.simulator.trials`
    training up to the next decision     `planner.simulator.training`
"""

from dataclasses import replace

import numpy as np

from planner.goodput import Objective, progress_per_sample
from planner.menu import Floats, Indices, Menu
from planner.plan import Plan, plan_run
from planner.policies.policy import Policy
from planner.simulator.estimates import Estimate, estimate_critical_batch, learn_factor, normal_errors
from planner.simulator.runs import DRAWS, Outcome, Runs
from planner.simulator.state import State
from planner.simulator.training import Machine, advance
from planner.simulator.trials import make_trials
from planner.situation import Situation


def simulate(
    menu: Menu,
    samples_per_second: Floats,
    runs: Runs,
    policy: Policy,
    objective: Objective = "plain",
    record: bool = False,
) -> Outcome:
    """Train every run to its target with the decisions of `policy`.

    Progress follows the model that Goodput is made from: S sequences at batch B make S / (1 + B/φ) of it (times √B
    with the lr-aware objective), so this compares decisions, and says nothing about whether the model is right.
    Policies see φ with errors, and otherwise what the trainer shows them. If `runs.start` does not say, the job
    begins in what the policy picks after a first estimate, which costs nothing; a policy that picks nothing keeps the
    best Goodput of that estimate.
    """
    outcome = Outcome.unfinished(len(runs.seed), record)
    state = State.beginning(menu, np.asarray(samples_per_second, float), runs)
    machine, errors = Machine(menu, runs), normal_errors(runs)
    number = 0
    while len(state.row):
        draws, log_speed = errors[state.row, number % DRAWS], machine.log_speed(state, number)
        true_phi = state.critical_batch
        estimate = estimate_critical_batch(state, number, draws)
        current = state.current if number else _first(menu, state, estimate, objective)
        situation = _situation(menu, state, current, estimate, objective, number)
        state.current = current
        index = _decide(menu, state, situation, policy, log_speed)
        if record:
            _record(outcome, state, index, number)
        if situation.started:
            _pay(menu, state, index)
            learn_factor(menu, state, index, true_phi)
        state.current = index
        finished = advance(menu, state, number, log_speed, objective, draws)
        number += 1
        if finished.any():
            _finish(outcome, state.take(finished))
            state = state.take(~finished)
    return outcome


def _first(menu: Menu, state: State, estimate: Estimate, objective: Objective) -> Indices:
    """What runs before anybody has chosen: what the job file says, or else the best Goodput of the first estimate."""
    if state.runs.start is not None:
        return state.runs.start
    worth = progress_per_sample(menu.global_batch, estimate.critical_batch[:, None], objective)
    return np.argmax(state.believed * worth, axis=1)


def _situation(
    menu: Menu, state: State, current: Indices, estimate: Estimate, objective: Objective, number: int
) -> Situation:
    """What the policy sees, as of a job."""
    runs, noise_scale = state.runs, estimate.critical_batch / 2
    lr_decay = runs.lr_decay
    return Situation(
        menu=menu,
        samples_per_second=state.believed,
        throughput_error=state.error,
        unseen=state.unseen,
        current=current,
        noise_scale=noise_scale,
        critical_batch=estimate.critical_batch * np.exp(state.factor_shift),
        forecast=estimate.forecast,
        samples_consumed=estimate.samples,
        samples_left=np.maximum(runs.planned_samples - state.samples, runs.every_samples),
        samples_to_next=state.samples_to_next(menu),
        move_seconds=runs.move_seconds,
        trial_allowance=state.trial_allowance,
        objective=objective,
        number=number,
        plug_in=noise_scale / (1 + noise_scale / menu.global_batch[current]),
        started=number > 0 or runs.start is not None,
        lr_decay=None if lr_decay is None else np.array([lr_decay(at) for at in state.samples.tolist()]),
        start_batch=runs.start_batch,
    )


def _decide(menu: Menu, state: State, situation: Situation, policy: Policy, log_speed: Floats | None) -> Indices:
    """What runs from now on, after the trials that the policy asked for."""
    if situation.number == 0 and state.runs.first_guess is not None and situation.started:
        return state.current  # a job stays where it starts until it knows its noise scale
    choice = policy.choose(situation)
    if situation.started and choice.exploring is not None and choice.exploring.any():
        return make_trials(menu, state, choice, situation, log_speed)
    return choice.index


def _record(outcome: Outcome, state: State, index: Indices, number: int) -> None:
    """Add to the paths of the runs what begins now."""
    for place, (row, before, after) in enumerate(zip(state.row, state.current, index, strict=True)):
        if number == 0 or before != after:
            outcome.paths[row].append((float(state.progress[place]), int(after)))


def _finish(outcome: Outcome, finished: State) -> None:
    """Take in the runs that reached their target."""
    rows = finished.row
    outcome.seconds[rows], outcome.samples[rows] = finished.seconds, finished.samples
    outcome.moves[rows], outcome.trials[rows] = finished.moves, finished.trials


def _pay(menu: Menu, state: State, index: Indices) -> None:
    """Count the moves and the time that they take."""
    moved = index != state.current
    if not moved.any():
        return
    rung = menu.move_seconds(state.current, np.array([0.0, 1.0, 2.0]))[np.arange(len(index)), index].astype(int)
    state.seconds += np.where(moved, state.runs.move_seconds[np.arange(len(index)), rung], 0.0)
    np.add.at(state.moves, (np.flatnonzero(moved), rung[moved]), 1)


def best_fixed_seconds(menu: Menu, samples_per_second: Floats, runs: Runs, objective: Objective = "plain") -> Floats:
    """What the configuration takes that is the fastest of all from start to target, by the true times of each run;
    shape (R,). Nobody decides or learns anything."""
    count, size = len(runs.seed), len(menu)
    fixed = replace(runs.take(np.repeat(np.arange(count), size)), first_guess=None)  # each run in each configuration
    machine, state = Machine(menu, fixed), State.beginning(menu, np.asarray(samples_per_second, float), fixed)
    state.corrections, state.current = None, np.tile(np.arange(size), count)
    best = np.full(count, np.inf)
    number = 0
    while len(state.row):
        log_speed = machine.log_speed(state, number)
        finished = advance(menu, state, number, log_speed, objective, np.zeros(len(state.row)))
        run = state.row // size
        np.minimum.at(best, run[finished], state.seconds[finished])
        state, number = state.take(~finished & (state.seconds < best[run])), number + 1
    return best


def oracle(
    menu: Menu,
    samples_per_second: Floats,
    critical_batch: Floats,
    progress: float,
    move_seconds: Floats,
    objective: Objective = "plain",
    start: int | None = None,
) -> Plan:
    """The bound: the plan of somebody who knows φ and pays the same for moves, and the best fixed configuration."""
    middles = np.sqrt(critical_batch[1:] * critical_batch[:-1])
    return plan_run(menu, samples_per_second, middles, progress, move_seconds, objective, start)
