"""The forecast of the critical batch against laws that are known, and what a decision shows of it."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planner_decision import START, TABLE, noise
from test_planner_decision import planner as planner_of

from copus.noise.estimator import NoiseEstimator
from copus.noise.memory import Clock
from copus.noise.step_estimate import StepEstimate
from planner.forecast import (
    LAWS_ERROR,
    LAWS_FREEDOM,
    QUANTILE_90,
    CriticalBatchForecast,
    law_correction,
    log_error,
)
from planner.planner import Planner
from planner.sampling import HalfLife
from planner.simulator.trajectory import geometric, grid, linear, power

LAWS = {"geometric": geometric(2.0, 64.0), "linear": linear(2.0, 64.0), "power": power(2.0, 64.0)}


@pytest.mark.parametrize("law", LAWS)
def test_the_forecast_follows_any_law_under_30_percent_noise(law):
    """300 runs of 200 estimates: the level is right to 15 %, and its interval says so."""
    rng, runs = np.random.default_rng(3), 300
    forecast = CriticalBatchForecast.unknown(np.full(runs, 200.0))
    for n in range(1, 200):
        truth = np.log(np.interp(n / 200, grid(), LAWS[law]))
        forecast.observe(np.full(runs, float(n)), np.exp(truth + 0.3 * rng.normal(size=runs)), np.full(runs, 0.3))
        if n in (40, 100, 190):
            here = np.full(runs, float(n))
            error = np.log(forecast.at(here)) - truth
            said = np.log(forecast.at(here, 1.0) / forecast.at(here))
            assert abs(error.mean()) < 0.15
            assert error.std() < 0.13
            assert 0.7 < said.mean() / error.std() < 2.0
        if n == 60:
            low, high = (forecast.at(np.full(runs, 120.0), sigmas) for sigmas in (-QUANTILE_90, QUANTILE_90))
            later = np.interp(120 / 200, grid(), LAWS[law])
            assert ((low <= later) & (later <= high)).mean() > 0.9, "whatever the law, twice as far on"
            assert np.median(high / low) < 6, "not by being useless"
    ahead = np.log(forecast.at(np.full((runs, 1), 220.0), 1.0) / forecast.at(np.full((runs, 1), 220.0)))
    assert (ahead[:, 0] > said).all(), "farther on less is known"


def test_the_forecast_before_it_has_seen_much():
    forecast = CriticalBatchForecast.unknown(np.array([1000.0]))
    forecast.observe(np.array([1.0]), np.array([10.0]), np.array([0.3]))
    assert forecast.at(np.array([1.0])) == pytest.approx(10.0)
    low, middle, high = (float(forecast.at(np.array([1000.0]), s)[0]) for s in (-1.0, 0.0, 1.0))
    assert middle == pytest.approx(10.0 * (1050 / 51) ** 0.5), "the prior"
    assert low < 10.0 < middle < high
    assert low > 5.0, "noise scales do not fall: a level that is one error lower, and no growth"


def test_an_estimate_that_repeats_itself_teaches_less():
    once, often = (CriticalBatchForecast.unknown(np.array([1000.0])) for _ in range(2))
    for n in range(20):
        once.observe(np.array([100.0 + n]), np.array([10.0]), np.array([0.3]), 0.1)
        often.observe(np.array([100.0 + n]), np.array([10.0]), np.array([0.3]), 1.0)
    here = np.array([119.0])
    assert once.at(here, 1.0) > 1.1 * often.at(here, 1.0)


def test_the_forecast_survives_a_checkpoint():
    first, resumed = (CriticalBatchForecast.unknown(np.array([length])) for length in (1000.0, 1.0))
    for n in (10.0, 20.0, 40.0):
        first.observe(np.array([n]), np.array([n]), np.array([0.2]))
    resumed.restore(json.loads(json.dumps(first.state())))
    resumed.restore({})
    assert resumed.at(np.array([500.0]), 1.0) == first.at(np.array([500.0]), 1.0)


def test_log_error_of_intervals():
    assert log_error(10.0 / 1.645, 10.0 * 1.645) == pytest.approx(np.log(1.645) / 1.645)
    assert log_error(None, 20.0) == log_error(5.0, None) == pytest.approx(np.log(2))


def test_estimates_that_scatter_more_than_they_say_widen_the_interval():
    calm, wild = (CriticalBatchForecast.unknown(np.array([1000.0])) for _ in range(2))
    for n in range(1, 30):
        calm.observe(np.array([float(n)]), np.array([10.0]), np.array([0.1]))
        wild.observe(np.array([float(n)]), np.array([10.0 * np.exp(0.5 * (-1) ** n)]), np.array([0.1]))
    here = np.array([29.0])
    assert np.log(wild.at(here, 1.0) / wild.at(here)) > 2 * np.log(calm.at(here, 1.0) / calm.at(here))


def test_a_decision_shows_the_noise_scale_at_twice_the_tokens():
    deciding = planner_of(TABLE, critical_batch_factor=2.0)
    assert deciding.decide(noise(None), START, 0).forecast is None
    found = deciding.decide(noise(8.0, 6.5, 11.0), START, 1000).forecast
    assert found.tokens == 2 * 1000 * 32
    assert found.low < 8.0 < found.value < found.high
    twice = np.array([2000.0])
    assert found.value == pytest.approx(float(deciding.decide(noise(None), START, 1000).forecast.value))
    phi = CriticalBatchForecast.unknown(np.array([200.0 * deciding.config.every_samples]))
    phi.observe(np.array([1000.0]), np.array([16.0]), np.array([log_error(6.5, 11.0)]))
    assert found.high == pytest.approx(float(phi.at(twice, QUANTILE_90)[0]) / 2)


def _critical_batches(law, steps, seed=0):
    """What a planner takes for the critical batch in a job of so many steps, beside the truth, at each decision.

    `law` gives tr Σ and |G|² at a share of the job. Each step sees them with errors of 15 and 45 %.
    """
    rng, batch = np.random.default_rng(seed), 4
    planner = Planner(planner_of(TABLE, critical_batch_factor=1.0, policy="static").predictor, 0, batch * steps)
    clock, estimator, pairs = Clock(HalfLife(0.02 * batch * steps, 100)), NoiseEstimator(), []
    for step in range(1, steps + 1):
        trace, grad_sq = law(step / steps)
        seen = StepEstimate(grad_sq * (1 + 0.45 * rng.normal()), trace * (1 + 0.15 * rng.normal()), degrees=3)
        clock.tick(batch)
        estimator.update(seen, clock, batch * step, batch)
        if step % max(steps // 100, 1) == 0:
            decision = planner.decide(estimator.estimate(), START, batch * step)
            if decision.critical_batch is not None:
                pairs.append((step / steps, decision.critical_batch, decision.noise.value, trace / grad_sq))
    return np.array(pairs).T


@pytest.mark.parametrize("steps", [120, 500, 2000])
@pytest.mark.parametrize(
    "law",
    [
        lambda share: (share, 1.0),
        lambda share: (1.0, 1 / share),
        lambda share: (share**0.25, share**-0.25),
        lambda share: (1.0, 1.0),
    ],
    ids=["tr Σ ∝ t", "1/|G|² ∝ t", "φ ∝ √t", "constant"],
)
def test_a_growing_noise_scale_is_not_read_late(law, steps):
    """The average itself lags, by 30 % in the shortest jobs; the critical batch of a decision does not."""
    runs = [_critical_batches(law, steps, seed) for seed in range(4)]
    critical_batch, average, truth = np.concatenate([values[1:, values[0] > 0.4] for values in runs], axis=1)
    assert abs(np.log(critical_batch / truth).mean()) < 0.13
    if law(0.5) != law(1.0):
        assert np.log(average / truth).mean() < -0.05, "or the test says nothing"


@given(
    st.floats(-8, 8).filter(lambda away: abs(away) > 1e-3),
    st.floats(0.01, 1.0),
    st.floats(0.05, 1.0),
    st.floats(1, 1e4),
)
def test_laws_pull_towards_them_never_beyond_and_leave_c_surer(
    away: float, error: float, factor_error: float, measured: float
) -> None:
    laws = np.array([measured * math.exp(away)])
    shift, left = law_correction(laws, np.array([measured]), np.array([error]), np.array([factor_error]))
    assert 0 < shift[0] / away < 1
    assert 0 < left[0] < factor_error


def test_laws_count_less_the_further_they_are_off_and_not_at_all_if_c_is_exact() -> None:
    away = np.array([0.5, 1.0, 2.0, 4.0, 8.0])
    one = np.ones_like(away)
    shift, _ = law_correction(np.exp(away), one, 0.1 * one, 0.6 * one)
    assert (np.diff(shift / away) < 0).all()
    assert shift[-1] < shift.max()
    shift, left = law_correction(np.exp(away), one, 0.1 * one, 0 * one)
    assert not shift.any()
    assert not left.any()


def test_the_noise_scale_of_two_equal_estimates_is_in_the_middle() -> None:
    """If c is as unsure as laws are, and they nearly agree, φ is their geometric mean but for the tails of laws."""
    shift, _ = law_correction(np.array([1.02]), np.array([1.0]), np.array([0.0]), np.array([LAWS_ERROR]))
    likely = (LAWS_FREEDOM + 1) / LAWS_FREEDOM
    assert shift[0] == pytest.approx(math.log(1.02) * likely / (1 + likely), rel=1e-3)
