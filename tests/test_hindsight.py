"""What a run that is over could have done: with known truths, on machines that are not still."""

import dataclasses

import numpy as np
import pytest
from past_runs import ADAPTS, past_run

from planner.hindsight import look_back
from planner.step_times import fit_step_times

WORLDS = {"still": {"drift": 0.0, "burst": 0.0}, "drifting": {"burst": 0.0}, "busy": {}}


@pytest.mark.parametrize("world", WORLDS)
def test_intervals_cover_the_truth_about_as_often_as_they_say(world: str) -> None:
    """At 90 % fewer than 30 of 40 happen once in 600. The best fixed one is chosen by the same data."""
    first = best = 0
    for seed in range(40):
        told = past_run(seed, **WORLDS[world])
        found = look_back(told.run)
        assert found is not None
        assert found.gain_over_first is not None
        first += found.gain_over_first.low <= told.gains[0] <= found.gain_over_first.high
        gain = found.gain_over_best_fixed
        best += gain.low <= told.gains[found.best_fixed] <= gain.high
    assert first >= 30
    assert best >= 28


def test_a_run_that_never_moved_gained_nothing_over_its_first_configuration() -> None:
    told = past_run(3, ((0.0, 1),))
    found = look_back(told.run)
    assert found is not None
    assert found.gain_over_first is not None
    assert found.gain_over_first.low == pytest.approx(0, abs=0.1)
    assert found.gain_over_first.high == pytest.approx(0, abs=0.1)


def test_time_that_moves_and_decisions_took_counts_against_the_run() -> None:
    run = past_run(4, ((0.0, 1),)).run
    found = look_back(dataclasses.replace(run, lost_seconds=0.25 * float(run.seconds.sum())))
    assert found is not None
    assert found.gain_over_first is not None
    assert found.gain_over_first.value == pytest.approx(-20, abs=0.5)
    assert found.regret_to_best_schedule.value > 20


def test_a_busy_episode_does_not_make_the_configuration_slow_that_ran_in_it() -> None:
    """The machine takes twice as long for most of the steps of the second configuration: its plain median says 3.0."""
    rng = np.random.default_rng(0)
    lengths = [100, 30, 30, 10, 60]
    which, slow = np.repeat([0, 0, 1, 1, 0], lengths), np.repeat([0.0, 0.7, 0.7, 0.0, 0.0], lengths)
    seconds = np.array([1.0, 1.5])[which] * np.exp(slow + 0.02 * rng.standard_normal(len(which)))
    fit = fit_step_times(which, seconds, np.cumsum(seconds))
    beside = np.array([-1.0, 1.0])
    off, error = beside @ fit.mean - np.log(1.5), np.sqrt(beside @ fit.covariance @ beside)
    assert abs(off) < 1.645 * error
    assert error < 0.1


def test_a_step_that_stalls_moves_nothing() -> None:
    which, seconds = np.repeat([0, 1], 100), np.repeat([1.0, 2.0], 100)
    stalled = seconds.copy()
    stalled[[5, 120]] = 60.0
    calm, odd = (fit_step_times(which, each, np.cumsum(seconds)) for each in (seconds, stalled))
    assert odd.mean[1] - odd.mean[0] == pytest.approx(calm.mean[1] - calm.mean[0], abs=0.02)


def test_a_single_configuration_that_ran_is_the_best_fixed_one_if_nothing_else_is_known() -> None:
    run = dataclasses.replace(past_run(5, ((0.0, 2),)).run, predicted={})
    found = look_back(run)
    assert found is not None
    assert (found.best_fixed, found.best_fixed_ran) == (0, True)


def test_a_predicted_configuration_may_be_the_best_fixed_one_and_is_marked_so() -> None:
    told = past_run(6, ((0.0, 0),), drift=0.0, burst=0.0)
    found = look_back(told.run)
    assert found is not None
    assert found.best_fixed != 0
    assert not found.best_fixed_ran
    gain = found.gain_over_best_fixed
    assert gain.value < 0
    assert gain.high - gain.low > 20  # nobody knows c, nor how fast it is


def test_nothing_is_said_without_a_noise_scale_or_without_settled_steps() -> None:
    run = past_run(7).run
    nothing = np.zeros(0)
    assert look_back(dataclasses.replace(run, noise_samples=nothing, noise_log=nothing, noise_error=nothing)) is None
    assert look_back(dataclasses.replace(run, settled=np.zeros(len(run.settled), bool))) is None


def test_the_best_schedule_is_no_worse_than_the_best_fixed_configuration() -> None:
    for seed in range(5):
        told = past_run(seed, ADAPTS, burst=0.0)
        found = look_back(told.run)
        assert found is not None
        fixed, best = 1 + found.gain_over_best_fixed.value / 100, 1 / (1 + found.regret_to_best_schedule.value / 100)
        assert best <= fixed * 1.01
