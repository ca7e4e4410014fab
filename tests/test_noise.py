"""The noise estimate against synthetic gradients whose noise is known."""

import json
from collections.abc import Iterator

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


def _pairings(parts: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Every way to put an even number of parts into pairs."""
    if not parts:
        yield []
        return
    first, *others = parts
    for index, second in enumerate(others):
        for left in _pairings(others[:index] + others[index + 1 :]):
            yield [(first, second), *left]


@given(parts=st.sampled_from([4, 6]), size=st.integers(1, 8), seed=st.integers(0, 1000))
def test_merging_parts_is_consistent(parts: int, size: int, seed: int) -> None:
    """Parts merged by twos, averaged over every way to do so, give exactly what the parts give: both are the same
    U-statistic."""
    gradients = np.random.default_rng(seed).normal(size=(parts, 5)) + 0.3
    mean_sq = float((gradients.mean(axis=0) ** 2).sum())
    fine = estimate_step(mean_sq, (gradients**2).sum(axis=1), size)
    merged = [
        estimate_step(mean_sq, np.array([((gradients[a] + gradients[b]) ** 2).sum() / 4 for a, b in pairs]), 2 * size)
        for pairs in _pairings(list(range(parts)))
    ]
    assert np.mean([each.grad_sq for each in merged]) == pytest.approx(fine.grad_sq, rel=1e-9, abs=1e-9)
    assert np.mean([each.noise_trace for each in merged]) == pytest.approx(fine.noise_trace, rel=1e-9, abs=1e-9)


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


@given(
    batches=st.lists(st.sampled_from([2, 4, 8, 32]), min_size=2, max_size=6),
    values=st.tuples(st.floats(0.1, 10), st.floats(0.1, 100)),
)
def test_without_noise_of_its_own_no_batch_schedule_moves_it(batches: list[int], values: tuple[float, float]) -> None:
    """Steps that all say the same give the same, whatever the batches and wherever they change."""
    estimator, tokens = NoiseEstimator(20_000), 0
    for batch in batches:
        for _ in range(40):
            tokens += batch * SEQ_LEN
            estimator.update(StepEstimate(*values, degrees=batch - 1), tokens, batch * SEQ_LEN)
        assert estimator.estimate().value in (None, pytest.approx(values[1] / values[0], rel=1e-9))
    assert estimator.estimate().value is not None


@given(exponent=st.integers(-20, 20), seed=st.integers(0, 20))
def test_the_estimate_does_not_depend_on_the_scale_of_the_loss(exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    plain, scaled = NoiseEstimator(5_000), NoiseEstimator(5_000)
    factor = 2.0**exponent
    for step in range(1, 60):
        seen = _synthetic_step(rng, np.full(20, 0.3), 1.0, 4, 4)
        plain.update(seen, step * 200, 200)
        scaled.update(StepEstimate(factor * seen.grad_sq, factor * seen.noise_trace, seen.degrees), step * 200, 200)
    before, after = plain.estimate(), scaled.estimate()
    assert after.grad_sq == pytest.approx(factor * before.grad_sq)
    assert (after.value, after.low, after.high) == pytest.approx((before.value, before.low, before.high))


def test_a_step_of_many_parts_counts_for_more_of_the_trace() -> None:
    """Replicas (J = 2) between sampled micro-batches (J = 17) must not drown them."""
    estimator = NoiseEstimator(1_000_000)
    for step in range(1, 101):
        sampled = step % 2 == 0
        estimator.update(StepEstimate(1.0, 16.0 if sampled else 33.0, 16 if sampled else 1), step * 100, 100)
    assert estimator.estimate().noise_trace == pytest.approx(17.0)


def test_the_interval_is_open_where_the_signal_may_be_zero() -> None:
    """|G|² positive on average but within its error of zero: B may be as large as you like, and says so."""
    estimator = NoiseEstimator(1_000_000)
    rng = np.random.default_rng(0)
    for step in range(1, 2001):
        estimator.update(StepEstimate(0.001 + float(rng.normal()), 2.0), step * 1000, 1000)
    noise = estimator.estimate()
    if noise.grad_sq > 0:
        assert noise.low is not None
        assert noise.high is None
    else:
        assert noise.value is None


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
    older = NoiseEstimator(100_000)
    older.restore(estimator.state() | {"skipped": 0})  # which checkpoints once had
    assert older.estimate() == estimator.estimate()
    fresh = NoiseEstimator(100_000)
    fresh.restore({})
    assert fresh.estimate().samples == 0
