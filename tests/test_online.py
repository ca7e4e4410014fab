"""Live steps correct predictions, as far as they can tell, and are forgotten."""

import json
import math

import numpy as np
import pytest

from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.online import OnlineCorrection

TP2, DP4, PP2 = Layout(tp=2, dp=2), Layout(dp=4), Layout(pp=2, dp=2)


def of(layout: Layout, batch: int = 16, micro_batch: int = 1) -> Configuration:
    return Configuration(layout=layout, micro_batch=micro_batch, global_batch=batch)


RUNS = of(DP4)


def fed(
    steps: int, seconds: float, configuration: Configuration = RUNS, half_life: float = 10_000.0
) -> OnlineCorrection:
    """A correction that saw that many steps, predicted as 1 s."""
    live = OnlineCorrection(half_life)
    for _ in range(steps):
        live.observe(configuration, 1.0, seconds)
    return live


def feed(live: OnlineCorrection, configuration: Configuration, seconds: float, steps: int = 30) -> None:
    for _ in range(steps):
        live.observe(configuration, 1.0, seconds)


def test_nothing_seen_changes_nothing() -> None:
    live = OnlineCorrection()
    assert live.factor(RUNS) == 1.0
    assert live.error(RUNS) > 0.15
    assert live.error(RUNS, 0.0, of(TP2)) < 0.04, "a slow machine slows both"


def test_own_steps_count_fully_and_others_mostly() -> None:
    live = fed(100, 1.3)
    assert live.factor(RUNS) == pytest.approx(1.3, rel=0.01)
    assert 1.2 < live.factor(of(TP2)) < live.factor(of(DP4, 32)) < 1.3
    assert live.error(RUNS) < 0.02 < live.error(of(TP2)) < 0.15


def test_who_is_to_blame_shows_when_another_layout_runs() -> None:
    """DP4 takes 30 % longer than the table says, TP2 does not: so it is not the machine, and all batches of DP4 do."""
    live = fed(30, 1.3)
    assert live.factor(of(TP2)) > 1.2
    feed(live, of(TP2), 1.0)
    assert live.factor(RUNS) == pytest.approx(1.3, rel=0.05)
    assert live.factor(of(TP2)) == pytest.approx(1.0, rel=0.02)
    for batch, micro_batch in ((32, 1), (64, 1), (64, 4)):
        others = [live.factor(of(layout, batch, micro_batch)) for layout in (TP2, DP4)]
        assert others[1] / others[0] > 1.1, "the family is mended, its batches that never ran too"
    assert live.error(of(PP2)) > 0.05, "what is 30 % off twice may be off again"


def test_a_pause_is_ignored_and_a_change_is_followed() -> None:
    live = fed(50, 1.0)
    live.observe(RUNS, 1.0, 30.0)
    assert live.factor(RUNS) == pytest.approx(1.0, rel=0.01)
    feed(live, RUNS, 1.4, 60)
    assert live.factor(RUNS) == pytest.approx(1.4, rel=0.03)
    assert live.factor(of(TP2)) == pytest.approx(1.4, rel=0.15)


def test_a_machine_that_slows_down_bit_by_bit_is_followed() -> None:
    live, rng = OnlineCorrection(), np.random.default_rng(1)
    for step in range(600):
        live.observe(RUNS, 1.0, math.exp(0.3 * step / 600 + 0.03 * rng.normal()))
        if step > 100:
            assert abs(math.log(live.factor(RUNS)) - 0.3 * step / 600) < 0.06


def test_how_the_machine_was_is_forgotten_and_what_the_table_had_wrong_is_not() -> None:
    live = fed(50, 1.5)
    feed(live, of(TP2), 1.0, 50)
    blamed = live.factor(RUNS) / live.factor(of(TP2))
    feed(live, of(TP2), 1.0, 5000)
    assert live.factor(of(TP2)) == pytest.approx(1.0, abs=0.01)
    assert live.factor(RUNS) == pytest.approx(blamed, rel=0.2)
    rush = fed(50, 1.5, half_life=10)
    feed(rush, of(TP2), 1.5, 400)
    assert rush.factor(RUNS) == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_the_interval_is_honest(noise: float) -> None:
    """Effects of the sizes that are assumed: 80 % intervals of seen and unseen times, and of ratios, hold 80 %."""
    rng = np.random.default_rng(0)
    ran, other = of(TP2), of(PP2, 64, 4)
    inside = {"own": 0, "other": 0, "ratio": 0}
    repeats = 300
    for _ in range(repeats):
        machine = 0.15 * rng.normal()
        true = {each: machine + math.hypot(0.02, 0.01, 0.01) * rng.normal() for each in (RUNS, ran, other)}
        live = OnlineCorrection()
        for configuration in (RUNS, ran):
            for _ in range(25):
                live.observe(configuration, 1.0, math.exp(true[configuration] + noise * rng.normal()))
        for name, configuration in (("own", ran), ("other", other)):
            off = math.log(live.factor(configuration)) - true[configuration]
            inside[name] += abs(off) < 1.2816 * live.error(configuration)
        off = math.log(live.factor(other) / live.factor(ran)) - (true[other] - true[ran])
        inside["ratio"] += abs(off) < 1.2816 * live.error(other, 0.0, ran)
    assert all(0.72 < count / repeats < 0.97 for count in inside.values()), inside


def test_predictions_that_share_an_error_are_mended_together() -> None:
    """Two predictions known to ±60 %, nearly all of it shared: a step of one says how wrong the other is, and how sure
    that is."""
    shared = OnlineCorrection(shared=lambda one, other: 0.35)
    alone = OnlineCorrection()
    for live in (shared, alone):
        for _ in range(30):
            live.observe(RUNS, 1.0, 0.4, 0.6)
    assert shared.factor(RUNS) == pytest.approx(0.4, rel=0.02)
    assert shared.factor(of(TP2)) == pytest.approx(0.4, rel=0.1)
    assert alone.factor(of(TP2)) > 0.9
    assert shared.error(of(TP2), 0.6) < 0.3 < 0.5 < alone.error(of(TP2), 0.6)
    assert shared.error(of(TP2), 0.6, RUNS, 0.6) < 0.3
    assert shared.error(of(TP2), 0.6, of(PP2), 0.6) < alone.error(of(TP2), 0.6, of(PP2), 0.6)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_posterior_of_a_normal_distribution(seed: int) -> None:
    """What the filter says of times that were never seen, against conditioning the joint distribution at once."""
    rng = np.random.default_rng(seed)
    known = [RUNS, of(TP2), of(TP2, 64), of(PP2, 16, 4), of(PP2, 64, 4)]
    loads = 0.3 * rng.normal(size=(5, 3))
    own = 0.1 * rng.random(5)
    errors = np.sqrt((loads**2).sum(1) + own**2)
    live = OnlineCorrection(1e12, shared=lambda one, other: float(loads[known.index(one)] @ loads[known.index(other)]))
    joint = loads @ loads.T + np.diag(own**2 + 0.01**2) + 0.15**2
    for i, one in enumerate(known):
        for j, other in enumerate(known):
            joint[i, j] += 0.02**2 * (one.layout == other.layout)
            joint[i, j] += 0.01**2 * (one.layout == other.layout and one.micro_batch == other.micro_batch)
    ran, values = [0, 1, 3, 0], 0.1 * rng.normal(size=4)
    for place, value in zip(ran, values, strict=True):
        live.observe(known[place], 1.0, math.exp(value), float(errors[place]))
    noisy = joint[np.ix_(ran, ran)] + 0.1**2 * np.eye(4)
    mean = joint[:, ran] @ np.linalg.solve(noisy, values)
    left = joint - joint[:, ran] @ np.linalg.solve(noisy, joint[ran])
    for i, one in enumerate(known):
        assert math.log(live.factor(one)) == pytest.approx(mean[i], abs=1e-9)
        assert live.error(one, float(errors[i])) == pytest.approx(math.sqrt(left[i, i]), rel=1e-6)
    beside = math.sqrt(left[2, 2] + left[4, 4] - 2 * left[2, 4])
    assert live.error(known[2], float(errors[2]), known[4], float(errors[4])) == pytest.approx(beside, rel=1e-6)


def test_it_survives_a_checkpoint() -> None:
    live, resumed = fed(30, 1.3), OnlineCorrection()
    feed(live, of(TP2), 1.1)
    resumed.restore(json.loads(json.dumps(live.state())))
    resumed.restore({})
    for each in (live, resumed):
        feed(each, of(TP2), 1.2, 3)
    for configuration in (RUNS, of(TP2), of(TP2, 32), of(PP2)):
        assert resumed.factor(configuration) == live.factor(configuration)
        assert resumed.error(configuration, 0.1, RUNS) == live.error(configuration, 0.1, RUNS)
    assert resumed.steps(RUNS) == 30


@pytest.mark.parametrize("seconds", [0.0, -1.0, np.inf, np.nan])
def test_impossible_times_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        OnlineCorrection().observe(RUNS, 1.0, seconds)
    with pytest.raises(ValueError, match="positive"):
        OnlineCorrection(half_life_steps=0)
