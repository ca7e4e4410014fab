"""Statistical efficiency and Goodput."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.efficiency import statistical_efficiency
from planner.goodput import goodput

batch = st.integers(1, 2**20)
critical = st.floats(1e-2, 1e8)
speed = st.floats(1e-3, 1e6)


@given(batch, critical)
def test_efficiency_is_a_share(b, phi):
    assert 0 < statistical_efficiency(b, phi) <= 1


@given(batch, st.integers(1, 2**20), critical)
def test_a_larger_batch_is_less_efficient(b, more, phi):
    other = b + more
    assert statistical_efficiency(b, phi) > statistical_efficiency(other, phi)


@given(batch, st.floats(1e-2, 1e6), st.floats(1.001, 1e3))
def test_a_larger_critical_batch_is_more_efficient(b, phi, times):
    other = phi * times
    assert statistical_efficiency(b, phi) < statistical_efficiency(b, other)


def test_half_at_the_critical_batch():
    assert statistical_efficiency(37, 37) == 0.5
    assert statistical_efficiency(30, 10) == 0.25


@pytest.mark.parametrize(("b", "phi"), [(0, 1), (1, 0), (1, -2)])
def test_no_efficiency_without_batches(b, phi):
    with pytest.raises(ValueError, match="positive"):
        statistical_efficiency(b, phi)


def test_goodput_by_hand():
    assert goodput(100.0, 16, 48) == pytest.approx(75.0)
    assert goodput(100.0, 16, 48, "lr-aware") == pytest.approx(300.0)


@given(st.floats(1, 1e4), st.floats(0.01, 1), st.floats(0.1, 1e4))
def test_the_best_batch_of_an_affine_step_is_known(fixed, per_sample, phi):
    """T = B / (a + b·B): T · SE is largest at B = √(a·φ/b)."""
    best = math.sqrt(fixed * phi / per_sample)

    def score(b):
        return goodput(b / (fixed + per_sample * b), b, phi)

    assert score(best) >= max(score(best * 1.1), score(best / 1.1))


@given(speed, st.floats(1.001, 1e3), batch, critical, st.sampled_from(["plain", "lr-aware"]))
def test_at_one_batch_the_faster_wins(t, times, b, phi, objective):
    assert goodput(t, b, phi, objective) < goodput(t * times, b, phi, objective)
