"""Trials: a candidate is timed beside the configuration that runs, within a budget, and the job stays or goes back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner_decision import CLUSTER, DP2, MODEL, START, TP2, config, noise, of, row

from copus.backends.megatron.backend import MegatronBackend
from copus.checkpoints.store import newest_checkpoint, read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.events import Event, Reconfigure, Step
from copus.events import Trial as TrialEvent
from copus.loop import Trainer
from planner.planner import Planner
from planner.predictor import Predictor
from planner.trials import FEWEST_STEPS, MOST_STEPS, SETTLING_STEPS, Trial, TrialLedger
from profiles.throughput import CostPredictions, Prediction, Throughput
from tests.eager_planner import EagerPlanner, decide_often
from tests.megatron_jobs import configuration, random_batches, tiny_job
from tests.ranks import own_device, run_ranks

RUNNING, CANDIDATE = of(DP2, 1, 4), of(TP2, 1, 4)


def run_trial(machine, ratio, break_even=1.0, before=MOST_STEPS, move=1.0):
    """A whole trial on a machine: a function from the time in steps to how long a step of 1 s takes. The candidate
    takes `ratio` times as long. The trial, and whether the job stayed."""
    clock = iter(range(10**6))
    trial = Trial(3, CANDIDATE, RUNNING, [machine(next(clock)) for _ in range(before)], break_even)
    trial.observe_move(move)
    while (verdict := trial.observe_step(ratio * machine(next(clock)))) == "continue":
        pass
    if verdict == "stay":
        return trial, True
    assert verdict == "return"
    trial.observe_move(move, returned=True)
    while trial.observe_step(machine(next(clock))) == "continue":
        pass
    return trial, False


def jittering(seed, noise_of_step=0.03, drift=0.0):
    rng = np.random.default_rng(seed)
    return lambda at: float(np.exp(noise_of_step * rng.standard_normal() + drift * at))


def test_a_clearly_faster_candidate_is_kept_and_a_clearly_slower_one_is_left_at_once():
    kept, stayed = run_trial(jittering(1), 0.6)
    assert stayed
    assert kept.steps == SETTLING_STEPS + FEWEST_STEPS
    left, stayed = run_trial(jittering(1), 1.8)
    assert not stayed
    assert left.steps == 2 * (SETTLING_STEPS + FEWEST_STEPS)
    assert left.move_seconds == 2.0
    assert left.seconds == pytest.approx(2 + 5 * 1.8 + 5, rel=0.1)


def test_a_candidate_that_may_be_either_is_left_after_the_most_steps():
    trial, stayed = run_trial(jittering(2), 1.0)
    assert not stayed
    assert trial.steps <= 2 * (SETTLING_STEPS + MOST_STEPS)
    value, low, high = trial.ratio.ends
    assert low < value < high


def test_a_larger_step_is_kept_when_it_makes_up_for_its_time():
    """Twice the batch in 1.5 times the time: the break-even is where both have the same Goodput, not the same time."""
    assert run_trial(jittering(3), 1.5, break_even=1.9)[1]
    assert not run_trial(jittering(3), 1.5, break_even=1.1)[1]


@pytest.mark.parametrize("drift", [0.0, 0.01, -0.01])
def test_a_steady_drift_cancels_and_the_interval_covers(drift):
    """The machine slows down by 1 % with every step: the comparison with before alone would be 8 to 13 % off."""
    inside, errors = 0, []
    for seed in range(400):
        trial, _ = run_trial(jittering(seed, drift=drift), 1.2, before=MOST_STEPS)
        _, low, high = trial.ratio.ends
        inside += low <= 1.2 <= high
        errors.append(trial.ratio.log - np.log(1.2))
    assert inside >= 340, "85 % of 400, for a nominal 90 %"
    assert abs(np.median(errors)) < 0.02


def test_a_burst_on_one_step_changes_nothing():
    def machine(at):
        return 5.0 if at == MOST_STEPS + SETTLING_STEPS + 1 else 1.0 + 0.001 * (at % 3)

    trial, _ = run_trial(machine, 1.1)
    assert trial.ratio.ends[0] == pytest.approx(1.1, rel=0.01)


def test_the_budget_grows_with_the_elapsed_time_and_shrinks_with_trials():
    ledger = TrialLedger(0.02)
    assert ledger.allowance == 0
    for _ in range(1000):
        ledger.observe_step(1.0, timed=True)
    assert ledger.allowance == pytest.approx(20.0)
    trial, _ = run_trial(jittering(4), 1.5)
    ledger.close(trial)
    assert ledger.allowance == pytest.approx(20.0 - trial.seconds)
    again = TrialLedger(0.02)
    again.restore(json.loads(json.dumps(ledger.state())))
    assert again.tried(of(TP2, 1, 64)), "its line was timed"
    assert not again.tried(of(TP2, 2, 4))
    assert again.allowance == 0, "nothing to compare with yet"
    for _ in range(FEWEST_STEPS):
        again.observe_step(0.0, timed=True)
    assert again.allowance == pytest.approx(ledger.allowance)
    again.observe_move(0.0)
    assert again.allowance == 0, "what runs now was not timed"


def guessing(candidate_seconds: float, steps: int, **changes: Any) -> Planner:
    """A planner that has seen so many steps of START, 0.5 s each, and has a guess for one other."""
    guess = {of(TP2, 1, 16): Prediction(step_seconds=candidate_seconds, error=0.7, source="predicted")}
    rows = Throughput([row(START, step_seconds=0.5)], CostPredictions(guess))
    changes = {"policy": "goodput", "layout_move_seconds": 0.1} | changes
    planner = Planner(Predictor(config(**changes), MODEL, CLUSTER, "fp32", START, rows), total_samples=10**6)
    for _ in range(10):
        planner.observe_step(START, 0.5, settled=True)
    planner.trials.observe_step(0.5 * (steps - 10), timed=False)
    return planner


def test_a_trial_waits_until_the_budget_allows_it():
    now = noise(50.0, 45.0, 55.0), START, 1000
    assert not guessing(2.1, 10).decide(*now).switch
    tries = guessing(2.1, 3000).decide(*now)
    assert tries.trial
    assert tries.chosen == of(TP2, 1, 16)
    assert "is worth a trial" in tries.reason
    assert not guessing(2.1, 3000, trial_budget=0.0).decide(*now).switch


def test_what_even_its_uncertainty_could_not_make_fast_is_never_tried():
    now = noise(50.0, 45.0, 55.0), START, 1000
    assert not guessing(40.0, 3000).decide(*now).trial


def test_what_was_tried_is_not_tried_again_also_after_a_resume():
    now = noise(50.0, 45.0, 55.0), START, 1000
    planner = guessing(2.1, 3000)
    decision = planner.decide(*now)
    trial = planner.begin_trial(decision)
    stopped = guessing(2.1, 3000)
    stopped.restore(json.loads(json.dumps(planner.state())))
    assert stopped.before_trial == START
    planner.end_trial(trial)
    assert not planner.decide(*now).trial
    resumed = guessing(2.1, 3000)
    resumed.restore(json.loads(json.dumps(planner.state())))
    assert resumed.before_trial is None
    assert not resumed.decide(*now).trial


def test_on_another_framework_only_what_is_known_of_the_gradients_is_taken_up():
    now = noise(50.0, 45.0, 55.0), START, 1000
    planner = guessing(2.1, 3000)
    planner.end_trial(planner.begin_trial(planner.decide(*now)))
    elsewhere, fresh = guessing(2.1, 3000), guessing(2.1, 3000)
    elsewhere.restore(json.loads(json.dumps(planner.state())), with_speeds=False)
    for name in ("move_costs", "throughput", "before_trial"):
        assert elsewhere.state()[name] == fresh.state()[name]
    assert elsewhere.state()["trials"]["tried"] == [] != planner.state()["trials"]["tried"]
    assert elsewhere.state()["forecast"] == planner.state()["forecast"] != fresh.state()["forecast"]


@settings(max_examples=30)
@given(st.floats(0.2, 5.0), st.floats(0.2, 5.0))
def test_the_break_even_is_where_goodputs_are_equal(seconds, scale):
    planner = guessing(2.1, 3000)
    decision = planner.decide(noise(50.0, 45.0, 55.0), START, 1000)
    break_even = float(np.exp(planner.begin_trial(decision)._break_even))
    progress = [c.global_batch / (1 + c.global_batch / decision.critical_batch) for c in (decision.chosen, START)]
    assert break_even == pytest.approx(progress[0] / progress[1])


# In a run.

AFTER = configuration(4, 1, dp=2)


def _train(run: Path, break_even: float, stop_after: int | None = None) -> list[Event]:
    decide_often()
    job = tiny_job(2, {"tp": 2}, global_batch=4, tokens=16 * 160, micro_batch=1)
    limits = {"every_samples": 32, "max_global_batch": 8, "max_micro_batch": 2}
    job = job.model_copy(update={"planner": job.planner.model_copy(update=limits)})
    backend = MegatronBackend(job, own_device())
    state, start = TrainerState(), job.training.configuration
    newest = newest_checkpoint(run)
    if newest is not None:
        state, start = read_state(newest)
    backend.build(start)
    if newest is not None:
        backend.load(newest, state.optimizer_steps)
    planner = None
    if dist.get_rank() == 0:
        planner = EagerPlanner(job, AFTER, break_even)
        planner.restore(state.planner)
    events: list[Event] = []
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return stop_after is not None and steps >= stop_after

    Trainer(job, run, backend, random_batches, random_batches, planner, state, events.append, stop).train()  # type: ignore[arg-type]
    return events


@pytest.mark.dist
def test_a_run_tries_returns_and_goes_on(tmp_path: Path) -> None:
    events = run_ranks(2, _train, tmp_path, 1e-6)[0]
    there, back = [event for event in events if isinstance(event, Reconfigure)]
    assert there.trial
    assert back.trial
    assert (there.before, there.after) == (back.after, back.before)
    (trial,) = [event for event in events if isinstance(event, TrialEvent)]
    assert (trial.candidate, trial.running, trial.outcome) == (AFTER, there.before, "returned")
    assert trial.decision == there.decision
    assert trial.ratio_low < trial.ratio < trial.ratio_high
    assert trial.move_seconds == pytest.approx(there.seconds + back.seconds)
    during = [e for e in events if isinstance(e, Step) and there.step < e.step <= trial.step]
    assert len(during) == trial.steps <= 2 * (SETTLING_STEPS + MOST_STEPS)
    assert trial.seconds == pytest.approx(trial.move_seconds + sum(step.seconds for step in during))
    assert [e.step for e in events if isinstance(e, Step)] == list(range(1, 41)), "it trains all the time"


@pytest.mark.dist
def test_a_run_stays_where_a_trial_was_better_beyond_doubt(tmp_path: Path) -> None:
    events = run_ranks(2, _train, tmp_path, 1e6)[0]
    (move,) = [event for event in events if isinstance(event, Reconfigure)]
    (trial,) = [event for event in events if isinstance(event, TrialEvent)]
    assert (move.after, trial.outcome, trial.steps) == (AFTER, "stayed", SETTLING_STEPS + FEWEST_STEPS)


@pytest.mark.dist
def test_a_run_that_stopped_in_the_middle_of_a_trial_resumes_in_what_ran_before(tmp_path: Path) -> None:
    stopped = run_ranks(2, _train, tmp_path, 1e-6, 11)[0]
    (there,) = [event for event in stopped if isinstance(event, Reconfigure)]
    assert not [event for event in stopped if isinstance(event, TrialEvent)]
    resumed = run_ranks(2, _train, tmp_path, 1e-6)[0]
    back = next(event for event in resumed if isinstance(event, Reconfigure))
    assert (back.after, back.trial) == (there.before, True)
    first = next(event for event in resumed if isinstance(event, Step))
    assert back.step < first.step, "before anything was trained on"
