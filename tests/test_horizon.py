"""The end of a job that has a target loss is forecast from its evaluations."""

import json
import math

import numpy as np
import pytest

from planner.horizon import Horizon

TOTAL = 400_000


def power_law(samples):
    return 2.0 + 60.0 * samples**-0.35


def after(evaluations, target, curve=power_law, noise=0.0, every=1000):
    horizon, rng = Horizon(TOTAL, target), np.random.default_rng(3)
    for number in range(1, evaluations + 1):
        horizon.observe(number * every, curve(number * every) + noise * rng.normal())
    return horizon


def test_without_a_target_or_with_few_evaluations_the_tokens_count():
    assert after(50, None).end(50_000) == TOTAL
    assert after(3, 3.5).end(3000) == TOTAL


@pytest.mark.parametrize("seen", [20, 40, 70])
def test_the_crossing_of_a_power_law_is_forecast_and_becomes_exact(seen):
    """It crosses 3.1 at 92,000 sequences; without a forecast 400,000 were planned."""
    crossing = (60.0 / 1.1) ** (1 / 0.35)
    assert 90_000 < crossing < 95_000
    found = after(seen, 3.1, noise=0.003).end(seen * 1000)
    assert (1 - 0.02 - 0.6 * (1 - seen * 1000 / crossing)) * crossing < found < 1.1 * crossing


def test_one_odd_evaluation_changes_little():
    steady, odd = after(40, 3.1), after(40, 3.1)
    odd.observe(40_500, 9.0)
    assert odd.end(41_000) == pytest.approx(steady.end(41_000), rel=0.05)


def test_a_loss_that_no_longer_falls_leaves_the_tokens():
    assert after(40, 1.0, curve=lambda samples: 3.0 + 1e-9 * samples).end(40_000) == TOTAL
    assert after(40, 1.0).end(40_000) == TOTAL, "it is never reached"


def test_the_evaluations_are_in_the_checkpoint_and_infinite_ones_are_not():
    horizon = after(40, 3.1)
    horizon.observe(41_000, math.inf)
    resumed = Horizon(TOTAL, 3.1)
    resumed.restore(json.loads(json.dumps(horizon.state())))
    assert resumed.end(42_000) == horizon.end(42_000) < TOTAL
