"""The noise estimate against synthetic gradients whose noise is known."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copus.noise.estimator import NoiseEstimator
from copus.noise.memory import BLOCKS_PER_HALF_LIFE, HALF_LIVES_KEPT, Blocks, Clock
from copus.noise.step_estimate import StepEstimate, estimate_step
from planner.sampling import HalfLife
from profiles.noise_scale import NoiseScale


class Average:
    """An estimator with a clock of its own: every step is measured."""

    def __init__(self, half_life_steps: int, half_life_samples: float = 0.0) -> None:
        self.clock = Clock(HalfLife(half_life_samples, half_life_steps))
        self.estimator = NoiseEstimator()
        self.samples_consumed = 0

    def update(self, step: StepEstimate, global_batch: int = 1) -> None:
        self.clock.tick(global_batch)
        self.samples_consumed += global_batch
        self.estimator.update(step, self.clock, self.samples_consumed, global_batch)

    def estimate(self) -> NoiseScale:
        return self.estimator.estimate()


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


def _run(rng: np.random.Generator, batches: list[int], half_life_steps: int = 100) -> Average:
    """Steps of the given batches (two parts each) on gradients with B_simple = 40."""
    average = Average(half_life_steps)
    gradient = np.full(100, 0.1)
    sigma = np.sqrt(40 * float((gradient**2).sum()) / 100)
    for batch in batches:
        average.update(_synthetic_step(rng, gradient, sigma, 2, batch // 2), batch)
    return average


def test_the_interval_covers_the_truth() -> None:
    """90 % nominal; over 300 runs the share that covers lies within what 85–95 % allows."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        noise = _run(rng, [16] * 150, half_life_steps=60).estimate()
        covered += noise.low is not None and noise.low <= 40 and (noise.high is None or noise.high >= 40)
    assert 0.84 < covered / 300 < 0.96


def test_a_change_of_batch_does_not_jump() -> None:
    rng = np.random.default_rng(3)
    average = _run(rng, [16] * 400)
    before = average.estimate()
    assert before.value == pytest.approx(40, rel=0.35)
    gradient, sigma = np.full(100, 0.1), np.sqrt(40 / 100)
    average.update(_synthetic_step(rng, gradient, sigma, 4, 16), 64)
    assert average.estimate().value == pytest.approx(before.value, rel=0.1)


def test_the_interval_survives_a_batch_that_grows_eightfold() -> None:
    """Known before and after every step, and never a wild one: few large steps do not stand for all of the memory."""
    rng = np.random.default_rng(4)
    average = _run(rng, [16] * 30)
    gradient, sigma = np.full(100, 0.1), np.sqrt(40 / 100)
    for _ in range(40):
        average.update(_synthetic_step(rng, gradient, sigma, 2, 64), 128)
        noise = average.estimate()
        assert noise.value is not None
        assert noise.low is not None
        assert 0.4 * 40 < noise.value < 2.5 * 40
    assert noise.high is not None


@given(
    batches=st.lists(st.sampled_from([2, 4, 8, 32]), min_size=2, max_size=6),
    values=st.tuples(st.floats(0.1, 10), st.floats(0.1, 100)),
)
def test_without_noise_of_its_own_no_batch_schedule_moves_it(batches: list[int], values: tuple[float, float]) -> None:
    """Steps that all say the same give the same, whatever the batches and wherever they change."""
    average = Average(20)
    for batch in batches:
        for _ in range(40):
            average.update(StepEstimate(*values, degrees=batch - 1), batch)
        assert average.estimate().value == pytest.approx(values[1] / values[0], rel=1e-9)


@given(exponent=st.integers(-20, 20), seed=st.integers(0, 20))
def test_the_estimate_does_not_depend_on_the_scale_of_the_loss(exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    plain, scaled = Average(25), Average(25)
    factor = 2.0**exponent
    for _ in range(60):
        seen = _synthetic_step(rng, np.full(20, 0.3), 1.0, 4, 4)
        plain.update(seen, 200)
        scaled.update(StepEstimate(factor * seen.grad_sq, factor * seen.noise_trace, seen.degrees), 200)
    before, after = plain.estimate(), scaled.estimate()
    assert after.grad_sq == pytest.approx(factor * before.grad_sq)
    assert (after.value, after.low, after.high) == pytest.approx((before.value, before.low, before.high))


def test_a_step_of_many_parts_counts_for_more_of_the_trace() -> None:
    """Replicas (J = 2) between sampled micro-batches (J = 17) must not drown them."""
    average = Average(10_000)
    for step in range(1, 1001):
        sampled = step % 2 == 0
        average.update(StepEstimate(1.0, 16.0 if sampled else 33.0, 16 if sampled else 1))
    assert average.estimate().noise_trace == pytest.approx(17.0, rel=2e-3)


def test_the_interval_is_open_if_the_signal_may_be_zero() -> None:
    """|G|² positive on average but within its error of zero: B may be as large as you like, and says so."""
    average = Average(1000)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        average.update(StepEstimate(0.05 + float(rng.normal()), 2.0))
    noise = average.estimate()
    assert noise.grad_sq > 0, "or the test says nothing"
    assert noise.low is not None
    assert noise.high is None


def test_too_little_is_unknown_and_not_a_number() -> None:
    average = Average(100)
    assert average.estimate().value is None
    average.update(StepEstimate(1.0, 2.0), 16)
    noise = average.estimate()
    assert (noise.value, noise.low, noise.high, noise.samples) == (None, None, None, 1)


def test_noise_without_signal_is_unknown() -> None:
    average = Average(10)
    for _ in range(100):
        average.update(StepEstimate(-0.01, 2.0))
    assert average.estimate().value is None


def test_negative_steps_are_averaged_and_not_clipped() -> None:
    average = Average(10)
    for step in range(1, 101):
        average.update(StepEstimate(3.0 if step % 2 else -1.0, 5.0))
    assert average.estimate().grad_sq == pytest.approx(1.0, abs=0.35)


def test_it_follows_a_change_within_a_few_half_lives() -> None:
    average = Average(100)
    for step in range(1, 1001):
        average.update(StepEstimate(1.0, 10.0 if step < 500 else 100.0))
    assert average.estimate().value == pytest.approx(100, rel=0.05)


@given(
    steps=st.integers(1, 3000),
    half_life=st.builds(HalfLife, samples=st.floats(0, 1e6), steps=st.integers(20, 200)),
    global_batch=st.integers(1, 4096),
    measured_every=st.sampled_from([1, 4, 32]),
)
@settings(max_examples=30)
def test_few_blocks_are_kept_and_the_newest_weighs_most(
    steps: int, half_life: HalfLife, global_batch: int, measured_every: int
) -> None:
    clock, blocks, places = Clock(half_life), Blocks(2), []
    for step in range(1, steps + 1):
        before = clock.now
        clock.tick(global_batch)
        assert clock.before == before
        places.append(clock.now)
        if (step - 1) % measured_every == 0:
            blocks.add(clock, [1.0, step])
    # One block and the step that did not fit into it span more than a block may.
    assert len(blocks) <= 2 * (HALF_LIVES_KEPT * BLOCKS_PER_HALF_LIFE + 1)
    weights, sums = blocks.weighted()
    assert sums.sum() / weights.sum() <= steps
    assert places == sorted(places)


def test_a_step_weighs_the_square_of_its_number_while_the_run_is_young() -> None:
    average = Average(10**9)
    for step in range(1, 41):
        average.update(StepEstimate(1.0, float(step)))
    numbers = np.arange(1, 41)
    assert average.estimate().noise_trace == pytest.approx((numbers**3).sum() / (numbers**2).sum(), rel=1e-2)
    assert average.estimate().centroid == pytest.approx(
        (numbers**2 * (numbers - 0.5)).sum() / (numbers**2).sum(), rel=1e-2
    )


@pytest.mark.parametrize(("batch", "half_life_samples"), [(1, 1000.0), (64, 0.0)])
def test_later_it_halves_in_a_half_life_and_says_where_it_is_centred(batch: int, half_life_samples: float) -> None:
    """2^(−a) up to an age of k half-lives has its centre at 1/ln 2 − k/(2^k − 1)."""
    average, steps = Average(100, half_life_samples), 20_000
    for _ in range(steps):
        average.update(StepEstimate(1.0, 1.0), batch)
    centroid = average.estimate().centroid
    assert centroid is not None
    half_lives = 1 / np.log(2) - HALF_LIVES_KEPT / (2**HALF_LIVES_KEPT - 1)
    assert steps * batch - centroid == pytest.approx(half_lives * max(half_life_samples, 100 * batch), rel=0.03)


def test_state_goes_through_json_and_back() -> None:
    average = _run(np.random.default_rng(0), [8] * 150)
    again = Average(100)
    again.estimator.restore(json.loads(json.dumps(average.estimator.state())))
    again.clock.restore(json.loads(json.dumps(average.clock.state())))
    again.samples_consumed = average.samples_consumed
    assert again.estimate() == average.estimate()
    for running in (average, again):
        running.update(StepEstimate(1.0, 2.0), 8)
    assert again.estimate() == average.estimate()
