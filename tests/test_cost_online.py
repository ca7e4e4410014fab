"""Live steps correct predictions, and are forgotten."""

import numpy as np
import pytest

from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.online import OnlineCorrection
from profiles.layout import Layout

RUNS = Configuration(layout=Layout(dp=4), micro_batch=1, global_batch=16)
OTHER = Configuration(layout=Layout(tp=2, dp=2), micro_batch=1, global_batch=16)
BOTH = Configurations.of([RUNS, OTHER])


def fed(steps: int, seconds: float, half_life: float = 200.0) -> OnlineCorrection:
    """A correction that saw that many steps, predicted as 1 s."""
    live = OnlineCorrection(half_life)
    for _ in range(steps):
        live.observe(RUNS, 1.0, seconds)
    return live


def test_nothing_seen_changes_nothing() -> None:
    factors, sds = OnlineCorrection().factors(BOTH)
    assert factors.tolist() == [1.0, 1.0]
    assert (sds > 0.15).all()


def test_own_steps_count_fully_and_others_mostly() -> None:
    factors, sds = fed(100, 1.3).factors(BOTH)
    assert factors[0] == pytest.approx(1.3, rel=0.01)
    assert 1.15 < factors[1] < factors[0]
    assert sds[0] < 0.02 < sds[1] < 0.15
    assert fed(100, 1.3).drift == pytest.approx(factors[1])


def test_a_pause_is_ignored_and_a_change_is_followed() -> None:
    live = fed(50, 1.0)
    live.observe(RUNS, 1.0, 30.0)
    assert live.factors(BOTH)[0][0] == pytest.approx(1.0, rel=0.01)
    live = fed(50, 1.0, half_life=20)
    for _ in range(200):
        live.observe(RUNS, 1.0, 1.4)
    assert live.factors(BOTH)[0][0] == pytest.approx(1.4, rel=0.03)


def test_what_has_not_run_for_long_is_forgotten() -> None:
    live = fed(50, 1.5, half_life=10)
    then = live.factors(BOTH)
    for _ in range(400):
        live.observe(OTHER, 1.0, 1.0)
    now = live.factors(BOTH)
    assert now[0][0] < 1.02 < then[0][0]
    assert now[1][0] > then[1][0]


@pytest.mark.parametrize("seconds", [0.0, -1.0, np.inf, np.nan])
def test_impossible_times_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        OnlineCorrection().observe(RUNS, 1.0, seconds)
    with pytest.raises(ValueError, match="positive"):
        OnlineCorrection(half_life_steps=0)
