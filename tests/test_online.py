"""Live steps correct predictions, as far as they can tell, and are forgotten."""

import json
import math

import numpy as np
import pytest
from machines import Machine

from profiles import step_regression
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.online import OnlineCorrection

TP2, DP4, PP2 = Layout(tp=2, dp=2), Layout(dp=4), Layout(pp=2, dp=2)


def of(layout: Layout, batch: int = 16, micro_batch: int = 1) -> Configuration:
    return Configuration(layout=layout, micro_batch=micro_batch, global_batch=batch)


RUNS = of(DP4)


def fed(steps: int, seconds: float, configuration: Configuration = RUNS) -> OnlineCorrection:
    """A correction that saw that many steps, predicted as 1 s."""
    live = OnlineCorrection()
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


def alternate(shift: float, error: float, visits: int) -> OnlineCorrection:
    """DP4 takes e^shift times as long as predicted, TP2 does not; the job goes to and fro. Nothing else changes."""
    rng, live = np.random.default_rng(0), OnlineCorrection()
    for visit in range(visits):
        configuration, off = ((RUNS, shift), (of(TP2), 0.0))[visit % 2]
        for _ in range(30):
            live.observe(configuration, 1.0, math.exp(off + 0.03 * rng.normal()), error)
    return live


@pytest.mark.parametrize(
    ("shift", "error", "visits"), [(0.1, 0.03, 2), (0.26, 0.06, 2), (0.26, 0.03, 3), (0.5, 0.0, 5)]
)
def test_what_comes_back_with_a_configuration_is_the_configurations(shift: float, error: float, visits: int) -> None:
    """What a prediction may well be off by shows at the first change; what it may not, once it has come back."""
    live = alternate(shift, error, visits)
    assert math.log(live.factor(RUNS) / live.factor(of(TP2))) == pytest.approx(shift, abs=0.04)
    for batch, micro_batch in ((32, 1), (64, 1), (64, 4)):
        others = [live.factor(of(layout, batch, micro_batch)) for layout in (TP2, DP4)]
        assert others[1] > others[0], "the family is mended, its batches that never ran too"


def test_an_episode_that_begins_with_a_configuration_is_the_machines() -> None:
    """The machine slows down by half just as TP2 begins, and stays so when DP4 is back."""
    live = fed(40, 1.0)
    feed(live, of(TP2), 1.5, 20)
    assert live.factor(of(TP2)) / live.factor(RUNS) < 1.1
    feed(live, RUNS, 1.5, 20)
    assert live.factor(of(TP2)) / live.factor(RUNS) == pytest.approx(1.0, abs=0.02)
    feed(live, RUNS, 1.0, 20)
    assert live.factor(of(TP2)) / live.factor(RUNS) == pytest.approx(1.0, abs=0.02)
    assert live.drift > 0.1
    assert fed(100, 1.3).drift < 0.02, "slow is not drifting"


def test_a_comparison_says_what_it_says_whatever_the_machine_does() -> None:
    live = fed(40, 1.0)
    before = live.error(of(TP2), 0.3, RUNS, 0.05)
    live.observe_comparison(of(TP2), RUNS, 0.25, 0.02, (0.3, 0.05), steps=5)
    assert math.log(live.factor(of(TP2)) / live.factor(RUNS)) == pytest.approx(0.25, abs=0.02)
    assert live.error(of(TP2), 0.3, RUNS, 0.05) < 0.04 < before
    assert live.factor(RUNS) == pytest.approx(1.0, abs=0.02)
    assert live.steps(of(TP2)) == 5
    feed(live, RUNS, 1.6)
    assert math.log(live.factor(of(TP2)) / live.factor(RUNS)) == pytest.approx(0.25, abs=0.03)
    for ratio, error in ((math.nan, 0.1), (0.1, 0.0)):
        with pytest.raises(ValueError, match="log_ratio"):
            live.observe_comparison(of(TP2), RUNS, ratio, error)


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


LAYOUTS = [TP2, DP4, PP2, Layout(tp=4), Layout(tp=2, pp=2)]
SPACE = [of(layout, batch, micro_batch) for layout in LAYOUTS for micro_batch in (1, 2) for batch in (16, 64)]
ERROR = 0.05
"""Standard deviation of what every prediction of `SPACE` is wrong by."""


def held_by_intervals(kind: str, repeats: int = 25) -> dict[str, float]:
    """Share of true ratios that 80 % intervals hold, while a job alternates between one and five other configurations:
    of those that ran, and of those that never did."""
    held: dict[str, list[bool]] = {"ran": [], "never": []}
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        machine, run = Machine(kind, rng), math.exp(0.2 * rng.normal())
        miss = {configuration: math.hypot(ERROR, 0.02, 0.01, 0.01) * rng.normal() for configuration in SPACE}
        ran = [SPACE[place] for place in rng.permutation(len(SPACE))[:6]]
        live = OnlineCorrection()
        for visit in range(16):
            current = ran[1 + int(rng.integers(5))] if visit % 2 else ran[0]
            machine.wait(1.0)
            for _ in range(25):
                live.observe(current, 1.0, machine.step(0.1 * run * math.exp(miss[current])) / 0.1, ERROR)
            for other in SPACE if visit > 5 else []:
                if other != current:
                    off = math.log(live.factor(other) / live.factor(current)) - (miss[other] - miss[current])
                    inside = abs(off) < 1.2816 * live.error(other, ERROR, current, ERROR)
                    held["ran" if live.steps(other) else "never"].append(inside)
    return {name: float(np.mean(inside)) for name, inside in held.items()}


@pytest.mark.parametrize("kind", ["still", "drifting", "bursty"])
def test_intervals_of_ratios_hold_what_they_say_on_any_machine(kind: str) -> None:
    held = held_by_intervals(kind)
    assert 0.75 < held["never"] < 0.9, held
    assert 0.7 < held["ran"] < 0.97, held


@pytest.mark.parametrize("kind", ["drifting", "bursty"])
def test_a_machine_that_is_not_still_makes_no_prediction_of_others_absurd(kind: str) -> None:
    """After nineteen configurations have run, one that never did is known about as well as its own prediction was."""
    rng = np.random.default_rng(3)
    machine, live = Machine(kind, rng), OnlineCorrection()
    for configuration in SPACE[:-1]:
        for _ in range(10):
            live.observe(configuration, 1.0, machine.step(0.1) / 0.1, ERROR)
    assert live.error(SPACE[-1], ERROR, SPACE[0], ERROR) < 1.5 * ERROR


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
    assert alone.factor(of(TP2)) > 0.8
    assert shared.error(of(TP2), 0.6) < 0.3 < 0.5 < alone.error(of(TP2), 0.6)
    assert shared.error(of(TP2), 0.6, RUNS, 0.6) < 0.3
    assert shared.error(of(TP2), 0.6, of(PP2), 0.6) < alone.error(of(TP2), 0.6, of(PP2), 0.6)


@pytest.mark.parametrize("seed", range(5))
def test_without_heavy_tails_it_is_the_posterior_of_a_normal_distribution(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against conditioning the joint distribution of everything at once."""
    for name in ("TAIL", "JUMPS", "FREEDOM", "WANDER_WEIGHT"):
        monkeypatch.setattr(step_regression, name, 1e15)
    rng = np.random.default_rng(seed)
    known = [RUNS, of(TP2), of(TP2, 64), of(PP2, 16, 4), of(PP2, 64, 4)]
    loads = 0.3 * rng.normal(size=(5, 3))
    own = 0.1 * rng.random(5)
    errors = np.sqrt((loads**2).sum(1) + own**2)
    live = OnlineCorrection(shared=lambda one, other: float(loads[known.index(one)] @ loads[known.index(other)]))
    misses = loads @ loads.T + np.diag(own**2 + 0.01**2)
    for i, one in enumerate(known):
        for j, other in enumerate(known):
            misses[i, j] += 0.02**2 * (one.layout == other.layout)
            misses[i, j] += 0.01**2 * (one.layout == other.layout and one.micro_batch == other.micro_batch)
    ran, values = [0, 1, 3, 0], 0.1 * rng.normal(size=4)
    for place, value in zip(ran, values, strict=True):
        live.observe(known[place], 1.0, math.exp(value), float(errors[place]))
    # Seconds of the middles of the steps, a change of ten steps before each but the first, and of now; then in steps.
    seconds = np.exp(values)
    ends = np.cumsum(seconds + np.array([0.0, *(10 * seconds[1:])]))
    middles = np.array([*(ends - seconds / 2), ends[-1]]) / (ends[-1] / 4)
    times = np.concatenate([[0.0], np.cumsum(np.maximum(np.diff(middles), 1.0))])
    machine = 0.3**2 + step_regression.WANDER**2 * np.minimum.outer(times, times)
    noisy = misses[np.ix_(ran, ran)] + machine[:4, :4] + 0.1**2 * np.eye(4)
    across = misses[:, ran] + machine[4, :4]
    mean = across @ np.linalg.solve(noisy, values)
    left = misses + machine[4, 4] - across @ np.linalg.solve(noisy, across.T)
    for i, one in enumerate(known):
        assert math.log(live.factor(one)) == pytest.approx(mean[i], abs=1e-7)
        assert live.error(one, float(errors[i])) == pytest.approx(math.sqrt(left[i, i]), rel=1e-5)
    beside = math.sqrt(left[2, 2] + left[4, 4] - 2 * left[2, 4])
    assert live.error(known[2], float(errors[2]), known[4], float(errors[4])) == pytest.approx(beside, rel=1e-5)


def test_a_long_run_is_remembered_in_few_blocks() -> None:
    live, rng = OnlineCorrection(), np.random.default_rng(0)
    for visit in range(400):
        feed_noisily(live, (RUNS, of(TP2))[visit % 2], (0.2, 0.0)[visit % 2], rng, steps=12)
    assert len(live.state()["blocks"]) <= 64
    assert math.log(live.factor(RUNS) / live.factor(of(TP2))) == pytest.approx(0.2, abs=0.02)
    alone = OnlineCorrection()
    feed_noisily(alone, RUNS, 0.1, rng, steps=20_000)
    assert len(alone.state()["blocks"]) <= 64
    assert math.log(alone.factor(RUNS)) == pytest.approx(0.1, abs=0.02)


def feed_noisily(
    live: OnlineCorrection, configuration: Configuration, off: float, rng: np.random.Generator, steps: int
) -> None:
    for _ in range(steps):
        live.observe(configuration, 1.0, math.exp(off + 0.03 * rng.normal()), 0.1)


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
        OnlineCorrection(drift=0)
