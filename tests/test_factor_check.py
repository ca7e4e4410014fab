"""The online check of c: quiet where c is right, whatever the loss curve; heard where it is clearly wrong."""

import math

import numpy as np
import pytest
from test_planner_decision import START, TABLE, noise, planner

from planner.factor_check import LEVEL, FactorCheck, judge

ASSUMED = 40.0


def train(
    seed: int, true: float, batches: tuple[int, int], noise_per_sequence: float, early: float = 4000.0
) -> list[str]:
    """Warnings of a run on a loss that falls as a power law of useful tokens, at φ = `true` and 40 assumed ± 25 %."""
    rng = np.random.default_rng(seed)
    check = FactorCheck(window_samples=8192)
    check.critical_bounds = (0.8 * ASSUMED, 1.25 * ASSUMED)
    samples, useful, warnings = 0, 0.0, []
    for batch, length in zip(batches, (32_768, 12_000), strict=True):
        for _ in range(length // batch):
            loss = 2 + 2 / math.sqrt(1 + useful / early)
            samples += batch
            useful += batch / (1 + batch / true)
            warning = check.observe(samples, batch, loss + noise_per_sequence * rng.normal() / math.sqrt(batch))
            warnings += [warning] if warning else []
    return warnings


@pytest.mark.parametrize("batches", [(8, 32), (64, 16)])
@pytest.mark.parametrize("early", [400.0, 4000.0, 40_000.0])
def test_no_false_alarms(batches: tuple[int, int], early: float) -> None:
    """Nominal 1 %, and the bounds leave room: of 40 runs with the right φ at most 2 warn (4 or more: p < 0.001)."""
    assert LEVEL == 0.01
    assert sum(bool(train(seed, ASSUMED, batches, 0.02, early)) for seed in range(40)) <= 2


def test_the_level_of_the_test_itself() -> None:
    """On blocks made from the model with the very φ that is tested, 1 % of 3,000 are below 0.01."""
    rng = np.random.default_rng(5)
    x = (np.arange(-16, 16) + 0.5) / 16
    ratio = (1 + 8 / 40) / (1 + 32 / 40)
    curve = 3 - 0.2 * x + 0.03 * x**2 + np.where(x > 0, 0.01 + 0.2 * (1 - ratio) * x, 0.0)
    low = 0
    for _ in range(3000):
        seen = curve + 0.01 * rng.normal(size=32)
        low += judge(seen[:16], seen[16:], 8, 32, 40.0, 40.0).p_value < LEVEL
    assert 0.004 * 3000 <= low <= 0.017 * 3000


@pytest.mark.parametrize(
    ("true", "batches", "too"),
    [(2000.0, (8, 32), "small"), (2.0, (8, 32), "large"), (2000.0, (64, 16), "small"), (2.0, (64, 16), "large")],
)
def test_a_factor_that_is_far_off_is_noticed(true: float, batches: tuple[int, int], too: str) -> None:
    found = [train(seed, true, batches, 0.02) for seed in range(20)]
    assert sum(map(len, found)) >= 10
    for warnings in found:
        assert len(warnings) <= 1, "a change is judged once"
        assert all(f"seems too {too}" in warning for warning in warnings)


def test_noise_that_hides_everything_stays_silent() -> None:
    assert sum(bool(train(seed, 2000.0, (8, 32), 2.0)) for seed in range(20)) <= 2


def test_a_jump_of_the_loss_is_no_change_of_slope() -> None:
    x = np.arange(-16, 16) + 0.5
    wiggle = 1e-4 * np.sin(np.arange(32) * 2.4)
    ratio = (1 + 8 / 40) / (1 + 32 / 40)
    curve = 3 - 0.01 * np.where(x > 0, ratio * x, x) + wiggle
    kept = judge(curve[:16], curve[16:] + 0.5, 8, 32, 40.0, 40.0)
    assert kept.ratio == pytest.approx(ratio, rel=0.05)
    assert kept.p_value > 0.01


def test_a_loss_that_does_not_fall_says_nothing() -> None:
    rising = 3 + 0.01 * np.arange(32) + 1e-3 * np.cos(np.arange(32) * 1.7)
    assert judge(rising[:16], rising[16:], 8, 32, 30.0, 50.0) is None


def test_nothing_is_said_without_a_known_noise_scale_or_with_few_steps() -> None:
    check = FactorCheck(8192)
    for step in range(4000):
        batch = 8 if step < 2000 else 32
        samples = 8 * (step + 1) if step < 2000 else 16_000 + 32 * (step - 1999)
        assert check.observe(samples, batch, 5.0 - step / 1000) is None
    short = FactorCheck(8192)
    short.critical_bounds = (30.0, 50.0)
    for step in range(60):
        batch = (8, 32)[step // 20 % 2]
        assert short.observe(20 * 8 * (step // 20) + 32 * (step + 1), batch, 5.0 - 0.1 * step) is None


def test_the_planner_checks_against_c_times_the_interval_of_the_noise_scale() -> None:
    deciding = planner(TABLE, critical_batch_factor=2.0, noise_half_life_tokens=64 * 1024)
    rng = np.random.default_rng(1)
    deciding.decide(noise(20.0, 16.0, 25.0), START, 1000)
    samples, useful, heard = 0, 0.0, []
    for batch, steps in ((8, 4096), (32, 400)):
        for _ in range(steps):
            samples += batch
            useful += batch / (1 + batch / 2000)
            loss = 2 + 2 / math.sqrt(1 + useful / 4000) + 0.004 * rng.normal() / math.sqrt(batch)
            heard.append(deciding.observe_loss(samples, batch, loss))
    (warning,) = filter(None, heard)
    assert "a critical batch of 32 to 50 sequences" in warning
