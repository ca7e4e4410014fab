"""The noise estimate against synthetic gradients whose noise is known."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copus.noise.estimator import NoiseEstimator
from copus.noise.step_estimate import StepEstimate, estimate_step

SEQ_LEN = 64


def _synthetic_step(
    rng: np.random.Generator, gradient: np.ndarray, sigma: float, parts: int, size: int
) -> StepEstimate:
    """A step on gradients G + noise of covariance σ²·I per sequence."""
    means = gradient + rng.normal(size=(parts, len(gradient))) * sigma / np.sqrt(size)
    return estimate_step(float((means.mean(axis=0) ** 2).sum()), (means**2).sum(axis=1), size)


@pytest.mark.parametrize(("parts", "size"), [(2, 1), (2, 8), (8, 2), (32, 1)])
def test_a_step_is_unbiased(parts: int, size: int) -> None:
    rng = np.random.default_rng(parts * 100 + size)
    gradient, sigma, dimensions = np.full(50, 0.4), 1.0, 50
    steps = [_synthetic_step(rng, gradient, sigma, parts, size) for _ in range(6000)]
    for seen, truth in (
        ([step.grad_sq for step in steps], float((gradient**2).sum())),
        ([step.noise_trace for step in steps], sigma**2 * dimensions),
    ):
        error = np.std(seen) / np.sqrt(len(seen))
        assert abs(np.mean(seen) - truth) < 4 * error
        assert error < 0.1 * truth, "the test must be sharp enough to fail"


@given(scale=st.floats(1e-3, 1e3), parts=st.integers(2, 16), size=st.integers(1, 16), seed=st.integers(0, 1000))
def test_scaling_and_order_of_the_parts(scale: float, parts: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(parts, 5))
    mean_sq = float((gradients.mean(axis=0) ** 2).sum())
    parts_sq = (gradients**2).sum(axis=1)
    plain = estimate_step(mean_sq, parts_sq, size)
    scaled = estimate_step(scale**2 * mean_sq, scale**2 * parts_sq, size)
    shuffled = estimate_step(mean_sq, rng.permutation(parts_sq), size)
    np.testing.assert_allclose(
        [scaled.grad_sq, scaled.noise_trace],
        [scale**2 * plain.grad_sq, scale**2 * plain.noise_trace],
        rtol=1e-6,
        atol=1e-9 * scale**2,
    )
    np.testing.assert_allclose(
        [shuffled.grad_sq, shuffled.noise_trace], [plain.grad_sq, plain.noise_trace], rtol=1e-6, atol=1e-9
    )


def test_one_part_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two parts"):
        estimate_step(1.0, np.array([1.0]), 4)


def _run(rng: np.random.Generator, batches: list[int], half_life: int = 100_000) -> NoiseEstimator:
    """Steps of the given batches (two parts each) on gradients with B_simple = 40."""
    estimator = NoiseEstimator(half_life)
    gradient, tokens = np.full(100, 0.1), 0
    sigma = np.sqrt(40 * float((gradient**2).sum()) / 100)
    for batch in batches:
        tokens += batch * SEQ_LEN
        estimator.update(_synthetic_step(rng, gradient, sigma, 2, batch // 2), tokens, batch * SEQ_LEN)
    return estimator


def test_the_interval_covers_the_truth() -> None:
    """90 % nominal; over 300 runs the share that covers lies within what 85–95 % allows."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        noise = _run(rng, [16] * 150, half_life=60_000).estimate()
        covered += noise.low is not None and noise.low <= 40 and (noise.high is None or noise.high >= 40)
    assert 0.84 < covered / 300 < 0.96


def test_a_change_of_batch_does_not_jump() -> None:
    rng = np.random.default_rng(3)
    before = _run(rng, [16] * 400)
    value = before.estimate().value
    assert value is not None
    assert value == pytest.approx(40, rel=0.35)
    tokens = 400 * 16 * SEQ_LEN
    gradient, sigma = np.full(100, 0.1), np.sqrt(40 / 100)
    before.update(_synthetic_step(rng, gradient, sigma, 4, 16), tokens + 64 * SEQ_LEN, 64 * SEQ_LEN)
    after = before.estimate().value
    assert after == pytest.approx(value, rel=0.1)


def test_too_little_is_unknown_and_not_a_number() -> None:
    estimator = NoiseEstimator(100_000)
    assert estimator.estimate().value is None
    estimator.update(StepEstimate(1.0, 2.0), 1024, 1024)
    noise = estimator.estimate()
    assert (noise.value, noise.low, noise.high, noise.samples) == (None, None, None, 1)


def test_noise_without_signal_is_unknown() -> None:
    estimator = NoiseEstimator(1000)
    for step in range(1, 100):
        estimator.update(StepEstimate(-0.01, 2.0), step * 100, 100)
    assert estimator.estimate().value is None


def test_negative_steps_are_averaged_and_not_clipped() -> None:
    estimator = NoiseEstimator(1000)
    for step in range(1, 101):
        estimator.update(StepEstimate(3.0 if step % 2 else -1.0, 5.0), step * 100, 100)
    assert estimator.estimate().grad_sq == pytest.approx(1.0, abs=0.35)


def test_steps_that_are_not_finite_are_skipped_and_counted() -> None:
    estimator = NoiseEstimator(1000)
    estimator.update(StepEstimate(float("nan"), 1.0), 100, 100)
    estimator.update(StepEstimate(1.0, float("inf")), 200, 100)
    assert estimator.skipped == 2
    assert estimator.estimate().samples == 0


def test_it_follows_a_change_within_a_few_half_lives() -> None:
    estimator = NoiseEstimator(10_000)
    for step in range(1, 1001):
        estimator.update(StepEstimate(1.0, 10.0 if step < 500 else 100.0), step * 100, 100)
    assert estimator.estimate().value == pytest.approx(100, rel=0.05)


def test_state_goes_through_json_and_back() -> None:
    estimator = _run(np.random.default_rng(0), [8] * 150)
    again = NoiseEstimator(100_000)
    again.restore(json.loads(json.dumps(estimator.state())))
    assert again.estimate() == estimator.estimate()
    fresh = NoiseEstimator(100_000)
    fresh.restore({})
    assert fresh.estimate().samples == 0
