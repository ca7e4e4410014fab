"""The forecast of the noise scale: known power laws come back, and the interval covers what comes."""

import json
import math

import numpy as np
import pytest
from test_planner_decision import START, TABLE, noise, planner

from planner.forecast import MAX_POINTS, NoiseForecast
from profiles.noise_scale import NoiseScale

ERROR = 0.15
"""Standard error of log B_simple in these tests."""


def known(value: float, error: float = ERROR) -> NoiseScale:
    low, high = value * math.exp(-1.645 * error), value * math.exp(1.645 * error)
    return NoiseScale(grad_sq=1.0, noise_trace=value, value=value, low=low, high=high, samples=50)


def history(law, points: int, rng: np.random.Generator | None = None, first: int = 20_000) -> NoiseForecast:
    forecast = NoiseForecast(10_000)
    for tokens in range(first, first + 10_000 * points, 10_000):
        error = ERROR * rng.normal() if rng else 0.0
        forecast.observe(tokens, known(law(tokens) * math.exp(error)))
    return forecast


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_power_law_comes_back(alpha: float) -> None:
    found = history(lambda tokens: 0.02 * tokens**alpha, 40).at(1e6)
    assert found.exponent == pytest.approx(alpha, abs=0.02)
    assert found.value == pytest.approx(0.02 * 1e6**alpha, rel=0.03)
    assert found.points == 40


@pytest.mark.parametrize("points", [3, 6, 12, 30])
def test_the_interval_covers_a_later_estimate_and_the_exponent(points: int) -> None:
    """Nominal 90 %; few points are on the safe side. 400 histories tell 90 % from 86 %."""
    rng = np.random.default_rng(points)
    covered = inside = 0
    for _ in range(400):
        forecast = history(lambda tokens: 0.3 * tokens**0.4, points, rng)
        later = 2 * (20_000 + 10_000 * (points - 1))
        found = forecast.at(later)
        covered += found.low <= 0.3 * later**0.4 * math.exp(ERROR * rng.normal()) <= found.high
        inside += found.exponent_low <= 0.4 <= found.exponent_high
    assert covered >= 0.86 * 400
    assert inside >= 0.86 * 400
    if points == 30:
        assert covered <= 0.97 * 400, "not by being useless"


def test_one_point_is_a_constant_with_a_wide_interval_that_widens_with_distance() -> None:
    forecast = history(lambda tokens: 40.0, 1)
    near, far = forecast.at(20_000), forecast.at(200_000)
    assert near.value == far.value == pytest.approx(40)
    assert far.exponent == 0
    assert near.high / near.low > 2
    assert far.high / far.low > 10 * near.high / near.low
    assert NoiseForecast(1).at(5) is None


def test_more_points_narrow_the_interval() -> None:
    widths = [history(lambda tokens: 40.0, points).at(5e5) for points in (1, 2, 4, 8, 16)]
    ratios = [found.high / found.low for found in widths]
    assert ratios == sorted(ratios, reverse=True)


def test_scatter_beyond_the_points_own_intervals_widens_the_forecast() -> None:
    def jumpy(tokens: float) -> float:
        return 40 * math.exp(0.6 * (-1) ** (tokens // 10_000))

    calm, wild = history(lambda tokens: 40.0, 20).at(5e5), history(jumpy, 20).at(5e5)
    assert wild.high / wild.low > 2 * calm.high / calm.low


def test_points_nearer_than_the_smoothing_are_one_point() -> None:
    forecast = NoiseForecast(10_000)
    for tokens in range(20_000, 41_000, 1000):
        forecast.observe(tokens, known(30.0))
    assert forecast.at(50_000).points == 3


def test_unknown_noise_scales_are_left_out_and_vague_ones_weigh_little() -> None:
    forecast = history(lambda tokens: 30.0, 10)
    forecast.observe(500_000, NoiseScale(grad_sq=0, noise_trace=0, value=None, low=None, high=None, samples=3))
    assert forecast.at(1e6).points == 10
    forecast.observe(520_000, NoiseScale(grad_sq=1, noise_trace=1, value=300.0, low=None, high=None, samples=3))
    assert forecast.at(1e5).value == pytest.approx(30, rel=0.3)


def test_the_state_is_small_and_goes_through_json() -> None:
    forecast = history(lambda tokens: tokens**0.5, 1000)
    resumed = NoiseForecast(10_000)
    resumed.restore(json.loads(json.dumps(forecast.state())))
    assert resumed.at(2e7) == forecast.at(2e7)
    assert resumed.at(2e7).points <= MAX_POINTS
    assert resumed.at(2e7).exponent == pytest.approx(0.5, abs=0.01)


def test_a_decision_shows_the_forecast_at_twice_the_tokens() -> None:
    deciding = planner(TABLE)
    assert deciding.decide(noise(None), START, 0).forecast is None
    decision = deciding.decide(noise(8.0, 6.5, 11.0), START, 1000)
    assert decision.forecast.tokens == 2 * 1000 * 32
    assert decision.forecast.value == pytest.approx(8.0)
    assert decision.forecast.low < 6.5
    assert decision.forecast.high > 11.0
