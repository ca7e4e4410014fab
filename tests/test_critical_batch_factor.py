"""c from the run: recovered from the losses around changes of batch, with an interval that covers."""

import json
import math

import numpy as np
import pytest
from test_planner_decision import START, TABLE, noise, planner

from planner.config import PlannerConfig
from planner.critical_batch_factor import CriticalBatchFactor, log_likelihood

NOISE_SCALE = 20.0

GENERAL_FACTOR = PlannerConfig().critical_batch_factor_range


def train(seed, true, batches, loss_noise, length=24_000, early=4000.0, prior=2.0, factor=GENERAL_FACTOR):
    """The posterior after a run on a loss that falls as a power law of useful tokens, at φ = true · 20."""
    rng = np.random.default_rng(seed)
    posterior = CriticalBatchFactor(prior, factor, window_samples=8192)
    posterior.noise_scale = NOISE_SCALE * math.exp(0.1 * rng.normal()), 0.1
    samples, useful = 0, 0.0
    for batch in batches:
        for _ in range(length // batch):
            loss = 2 + 2 / math.sqrt(1 + useful / early)
            samples += batch
            useful += batch / (1 + batch / (true * NOISE_SCALE))
            posterior.observe(samples, batch, loss + loss_noise * rng.normal() / math.sqrt(batch))
    return posterior


@pytest.mark.parametrize("true", [0.8, 2.0, 5.0])
def test_c_is_recovered_with_an_interval_that_covers(true: float) -> None:
    """Nominal 90 %: of 30 runs at least 24 (fewer: p < 0.03). Whatever the prior says, the middle lies nearby."""
    runs = [train(seed, true, (8, 64, 8, 64), 0.02) for seed in range(30)]
    assert sum(low <= true <= high for low, high in (run.ends for run in runs)) >= 24
    assert abs(np.median([math.log(run.value / true) for run in runs])) < 0.35
    assert np.median([run.error for run in runs]) < 0.7 * math.log(GENERAL_FACTOR) / 1.645


@pytest.mark.parametrize("batches", [(8, 32), (64, 16)])
@pytest.mark.parametrize("early", [400.0, 4000.0, 40_000.0])
def test_the_bend_of_the_loss_is_not_taken_for_a_wrong_c(batches: tuple[int, int], early: float) -> None:
    """With one curvature on both sides a large bend looked like a change of slope."""
    values = [train(seed, 2.0, batches, 0.005, length=30_000, early=early).value for seed in range(10)]
    assert 1.4 < np.median(values) < 2.9


def test_noise_that_hides_everything_leaves_the_prior() -> None:
    for seed in range(10):
        posterior = train(seed, 30.0, (8, 32), 5.0)
        assert posterior.value == pytest.approx(2.0, rel=0.4)
        assert posterior.error > 0.7 * math.log(GENERAL_FACTOR) / 1.645


def test_every_change_narrows_what_is_known() -> None:
    one, many = (np.mean([train(s, 2.0, b, 0.02).error for s in range(8)]) for b in ((8, 64), (8, 64) * 3))
    prior = math.log(GENERAL_FACTOR) / 1.645
    assert many < one < prior


def test_a_calibrated_c_is_a_strong_prior_and_an_exact_one_never_moves() -> None:
    assert train(1, 10.0, (8, 64), 0.02, prior=2.0, factor=1.0).ends == (2.0, 2.0)
    calibrated = CriticalBatchFactor(3.0, 1.3, 8192)
    assert calibrated.ends == pytest.approx((3.0 / 1.3, 3.0 * 1.3), rel=0.02)


def test_the_likelihood_is_that_of_the_model() -> None:
    """Losses made from the model, bend and jump included: the right φ is the most likely of all."""
    x = (np.arange(-16, 16) + 0.5) / 16
    ratio = (1 + 8 / 40) / (1 + 64 / 40)
    s = np.where(x > 0, ratio, 1.0) * x
    curve = 3 - 0.2 * s + 0.05 * s**2 + np.where(x > 0, 0.01, 0.0) + 1e-4 * np.cos(np.arange(32) * 1.7)
    grid = np.geomspace(4, 400, 41)
    likelihood = log_likelihood(curve[:16], curve[16:], 8, 64, grid)
    assert grid[likelihood.argmax()] == pytest.approx(40.0, rel=0.12)
    rising = 3 + 0.01 * np.arange(32) + 1e-3 * np.cos(np.arange(32) * 1.7)
    assert log_likelihood(rising[:16], rising[16:], 8, 32, grid) is None


def test_nothing_is_learned_without_a_known_noise_scale_or_from_few_steps() -> None:
    blind, short = CriticalBatchFactor(2.0, 2.6, 8192), CriticalBatchFactor(2.0, 2.6, 8192)
    before = blind.ends
    for step in range(4000):
        batch = 8 if step < 2000 else 32
        samples = 8 * (step + 1) if step < 2000 else 16_000 + 32 * (step - 1999)
        blind.observe(samples, batch, 5.0 - step / 1000)
    short.noise_scale = 20.0, 0.1
    for step in range(60):
        batch = (8, 32)[step // 20 % 2]
        short.observe(20 * 8 * (step // 20) + 32 * (step + 1), batch, 5.0 - 0.1 * step)
    assert blind.ends == short.ends == before


def test_what_was_learned_is_in_the_checkpoint() -> None:
    learned, resumed = train(3, 5.0, (8, 64), 0.02), CriticalBatchFactor(2.0, GENERAL_FACTOR, 8192)
    resumed.restore(json.loads(json.dumps(learned.state())))
    assert resumed.ends == learned.ends
    other = CriticalBatchFactor(4.0, GENERAL_FACTOR, 8192)
    other.restore(learned.state())
    assert other.value == 4.0, "what was learned about another prior"


def test_the_planner_decides_with_what_the_run_taught() -> None:
    """φ is some fifty times the noise scale here: c grows, and so does the critical batch of the next decision."""
    deciding = planner(TABLE, policy="goodput", noise_half_life_tokens=64 * 1024)
    rng = np.random.default_rng(1)
    first = deciding.decide(noise(20.0, 18.0, 22.0), START, 1000)
    assert 1.2 < first.critical_batch_factor < 2.0, "laws expect a smaller critical batch of so short a job"
    samples, useful = 0, 0.0
    for batch, steps in ((8, 4096), (64, 400)):
        for _ in range(steps):
            samples += batch
            useful += batch / (1 + batch / 1000)
            deciding.observe_loss(samples, batch, 2 + 2 / math.sqrt(1 + useful / 4000) + 0.002 * rng.normal())
    later = deciding.decide(noise(20.0, 18.0, 22.0), START, samples)
    assert later.critical_batch_factor > 2.5
    low, high = later.critical_batch_factor_low, later.critical_batch_factor_high
    assert low < later.critical_batch_factor < high
    assert high / low < (first.critical_batch_factor_high / first.critical_batch_factor_low)
    assert later.critical_batch > 1.2 * first.critical_batch
