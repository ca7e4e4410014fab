"""The fit of the critical batch: known ones come back from made-up losses, with intervals that cover them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planner_decision import noise

from planner.calibration import CriticalBatchFit, combine_factor, fit_critical_batch, largest_within

BATCHES = np.array([4, 8, 16, 32, 64])


def losses(rng: np.random.Generator, critical: float, orders: int, error: float, first: float = 5.0) -> np.ndarray:
    """Each order of the data teaches an amount of its own, and each branch ends with an error of its own."""
    drops = 0.4 * np.exp(0.1 * rng.normal(size=(orders, 1)))
    return first - drops / (1 + BATCHES / critical) + error * rng.normal(size=(orders, len(BATCHES)))


@given(critical=st.floats(1, 2000), seed=st.integers(0, 1000))
def test_exact_losses_give_the_critical_batch_exactly(critical: float, seed: int) -> None:
    found = fit_critical_batch(BATCHES, losses(np.random.default_rng(seed), critical, 2, 0.0), 5.0)
    assert found.value == pytest.approx(critical, rel=1e-3)
    assert found.low == pytest.approx(critical, rel=1e-2)
    assert found.residual < 1e-6


@pytest.mark.parametrize("critical", [5, 60, 300])
def test_the_interval_covers_the_truth(critical: float) -> None:
    """Nominal 90 %, three orders; 200 repetitions tell 90 % from 82 %."""
    rng = np.random.default_rng(critical)
    covered = 0
    for _ in range(200):
        found = fit_critical_batch(BATCHES, losses(rng, critical, 3, 0.005), 5.0)
        covered += found.low <= critical <= (math.inf if found.high is None else found.high)
    assert 0.82 * 200 <= covered <= 0.97 * 200


def test_what_an_order_does_to_all_batches_alike_does_not_matter() -> None:
    shape = 1 / (1 + BATCHES / 30)
    found = fit_critical_batch(BATCHES, 5 - np.outer([0.1, 0.4, 0.9], shape), 5.0)
    assert found.value == pytest.approx(30, rel=1e-3)
    assert found.high / found.low < 1.01


def test_equal_losses_mean_that_only_a_lower_bound_is_known() -> None:
    rng = np.random.default_rng(3)
    found = fit_critical_batch(BATCHES, 4.6 + 0.002 * rng.normal(size=(4, 1)) + np.zeros((4, 5)), 5.0)
    assert found.value is None
    assert found.high is None
    noisy = fit_critical_batch(BATCHES, losses(rng, 1e9, 4, 0.002), 5.0)
    assert noisy.high is None
    assert noisy.low > 300


def test_one_order_gives_no_interval() -> None:
    found = fit_critical_batch(BATCHES, losses(np.random.default_rng(0), 30, 1, 0.001), 5.0)
    assert found.value == pytest.approx(30, rel=0.1)
    assert (found.low, found.high) == (None, None)


def test_what_cannot_be_fitted_is_refused() -> None:
    for batches, bad in (
        (BATCHES[:1], np.ones((2, 1))),
        (BATCHES, np.ones((2, 4))),
        (BATCHES, np.full((1, 5), np.nan)),
    ):
        with pytest.raises(ValueError, match="losses"):
            fit_critical_batch(batches, bad, 5.0)


def test_the_largest_batch_within_a_tolerance_by_hand() -> None:
    rows = np.array([[3.00, 3.004, 3.02, 3.005], [3.00, 3.006, 3.02, 3.005]])
    batches = np.array([4, 8, 16, 32])
    assert largest_within(batches, rows, 0.01) == 8, "32 is within, but 16 is not"
    assert largest_within(batches, rows, 0.001) == 4
    assert largest_within(batches, rows, 0.1) == 32


def test_the_factor_joins_the_doubts_about_both() -> None:
    fit = CriticalBatchFit(value=60.0, low=40.0, high=90.0, residual=0.0)
    value, low, high = combine_factor(fit, noise(30.0, 20.0, 45.0))
    assert value == 2.0
    assert low == pytest.approx(2 * math.exp(-math.sqrt(2) * math.log(1.5)))
    assert high == pytest.approx(2 * math.exp(math.sqrt(2) * math.log(1.5)))
    assert combine_factor(fit, noise(30.0, 30.0, 30.0))[1:] == pytest.approx((40 / 30, 90 / 30))
    unbounded = CriticalBatchFit(value=None, low=200.0, high=None, residual=0.0)
    assert combine_factor(fit, noise(None)) == (None, None, None)
    assert combine_factor(unbounded, noise(30.0, 20.0, 50.0)) == (None, 4.0, None)
