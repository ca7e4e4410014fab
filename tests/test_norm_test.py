"""The norm test: the batch that it asks for, on gradients whose noise is known, and what the policy makes of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_situations import situation_of
from test_planner_decision import DP2, START, TP2, noise, of, planner

from copus.noise.norm_window import NormWindow
from copus.noise.step_estimate import estimate_step
from planner.backend_traits import BackendTraits
from planner.config import PlannerConfig
from planner.policies.norm_test import NormTest, plug_in_batch, unbiased_batch
from planner.sampling import source_of_step
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.noise_scale import StepNorms


def workers(rng, gradient, sigma, parts, size):
    """Mean gradients of `parts` workers of `size` sequences each, on noise of covariance σ²·I a sequence."""
    return gradient + rng.normal(size=(parts, len(gradient))) * sigma / np.sqrt(size)


@given(parts=st.integers(2, 16), size=st.integers(1, 32), eta=st.floats(0.05, 2), seed=st.integers(0, 10_000))
def test_the_paper_form_is_the_published_formula_for_one_step(parts: int, size: int, eta: float, seed: int) -> None:
    """b = n·S / ((J − 1)·η²·|ḡ|²) with S the squared distances of the workers from their mean, summed."""
    each = workers(np.random.default_rng(seed), np.full(7, 0.3), 1.0, parts, size)
    mean = each.mean(axis=0)
    worker_variance = ((each - mean) ** 2).sum() / (parts - 1)
    published = size * worker_variance / (eta**2 * (mean**2).sum())
    window = NormWindow()
    step = estimate_step(float((mean**2).sum()), (each**2).sum(axis=1), size)
    window.add(float((mean**2).sum()), step.noise_trace)
    assert plug_in_batch(window.take(), eta) == pytest.approx(published, rel=1e-6)


@pytest.mark.parametrize(("parts", "size"), [(2, 1), (4, 4), (8, 16)])
def test_the_plug_in_asks_for_too_little_and_the_unbiased_form_does_not(parts: int, size: int) -> None:
    """B_simple = 40 sequences, η = 0.5: 160 would pass. Plugged in, 160 / (1 + 40/b)."""
    rng, gradient = np.random.default_rng(parts), np.full(400, 0.1)
    sigma = np.sqrt(40 * (gradient**2).sum() / len(gradient))
    window, steps = NormWindow(), []
    count = 24_000 // (parts * size) + 300
    for _ in range(count):
        each = workers(rng, gradient, sigma, parts, size)
        mean_sq = float((each.mean(axis=0) ** 2).sum())
        steps.append(estimate_step(mean_sq, (each**2).sum(axis=1), size))
        window.add(mean_sq, steps[-1].noise_trace)
    batch = parts * size
    norms = window.take()
    assert norms.steps == count
    assert plug_in_batch(norms, 0.5) == pytest.approx(160 / (1 + 40 / batch), rel=0.05)
    assert plug_in_batch(norms, 0.5) < batch / 0.5**2
    value = np.mean([step.noise_trace for step in steps]) / np.mean([step.grad_sq for step in steps])
    assert unbiased_batch(value, 0.5) == pytest.approx(160, rel=0.1)


def test_a_window_starts_anew_and_survives_a_checkpoint() -> None:
    window, resumed = NormWindow(), NormWindow()
    assert window.take() is None
    window.add(1.0, 4.0)
    resumed.restore(window.state())
    resumed.add(3.0, 8.0)
    assert resumed.take() == StepNorms(grad_sq=2.0, noise_trace=6.0, steps=2)
    assert resumed.take() is None


def situation(batch, value, candidates, number=0, plug_in=6.0):
    """Batch `batch` runs, the noise scale is `value`, and DP2 may run at the candidate batches."""
    sizes = list(dict.fromkeys((batch, *candidates)))
    speeds = {of(DP2, 1, size): 10.0 for size in sizes}
    return situation_of(speeds, of(DP2, 1, batch), 2 * value, noise_scale=value, number=number, plug_in=plug_in)


def chosen_by(policy, now):
    return now.menu.configurations[int(policy.choose(now).index[0])]


@given(
    batch=st.sampled_from([2, 4, 8, 16, 32]),
    value=st.floats(0.01, 1e4),
    eta=st.floats(0.1, 1.0),
    form=st.sampled_from(["paper", "unbiased"]),
)
def test_the_batch_never_shrinks_never_passes_the_cap_and_is_rounded_up(
    batch: int, value: float, eta: float, form: str
) -> None:
    policy, now = NormTest(form, eta, 1), situation(batch, value, [2, 4, 8, 16, 32])
    asked = policy.asked_batch(now)[0]
    chosen = chosen_by(policy, now).global_batch
    assert batch <= chosen <= 32
    assert chosen >= min(asked, 32)
    assert chosen == batch or chosen / 2 < asked, "no more than the next power of two"


@given(value=st.floats(0.1, 1e3), factor=st.floats(1.0, 10.0))
def test_more_noise_never_asks_for_less(value: float, factor: float) -> None:
    policy = NormTest("unbiased", 0.5, 1)
    less, more = (chosen_by(policy, situation(4, v, [2, 8, 16, 32, 64])) for v in (value, factor * value))
    assert more.global_batch >= less.global_batch


def test_the_fastest_micro_batch_of_the_present_layout_runs() -> None:
    speeds = {
        of(DP2, 1, 4): 10.0,
        of(DP2, 1, 16): 20.0,
        of(DP2, 4, 16): 30.0,
        of(DP2, 2, 32): 50.0,
        of(TP2, 4, 16): 90.0,
    }
    now = situation_of(speeds, of(DP2, 1, 4), 6.0, noise_scale=3.0)
    policy = NormTest("unbiased", 0.5, 1)  # asks for 12
    assert chosen_by(policy, now) == of(DP2, 4, 16)
    assert policy.reason(now, policy.choose(now)) == "the norm test (unbiased, η 0.5) asks for a batch of 12"


def test_reasons_for_staying() -> None:
    def reason(policy, now):
        choice = policy.choose(now)
        assert choice.index[0] == now.current[0]
        return policy.reason(now, choice)

    assert "never shrinks" in reason(NormTest("unbiased", 1.0, 1), situation(16, 8.0, [2, 4, 32]))
    assert "nothing beyond 16" in reason(NormTest("unbiased", 0.5, 1), situation(16, 8.0, [2, 4]))
    assert "every 4th" in reason(NormTest("unbiased", 0.5, 4), situation(4, 80.0, [8], number=3))
    assert "no step was measured" in reason(NormTest("paper", 0.5, 1), situation(4, 8.0, [8], plug_in=None))


def test_through_the_planner() -> None:
    """η 0.5 and a noise scale of 2.5 ask for 10; the paper's form, with tr Σ/|ḡ|² = 1.5, for 6."""
    times = {of(DP2, m, b): 0.1 * b for m in (1, 2) for b in (4, 8, 16)}
    norms = StepNorms(grad_sq=2.0, noise_trace=3.0, steps=5)
    unbiased = planner(times, policy="norm-test").decide(noise(2.5), START, 0, norms)
    assert unbiased.chosen == of(DP2, 1, 16)
    assert unbiased.reason == "noise scale 2.5 sequences: the norm test (unbiased, η 0.5) asks for a batch of 10"
    paper = planner(times, policy="norm-test", norm_test_form="paper").decide(noise(2.5), START, 0, norms)
    assert paper.chosen == of(DP2, 1, 8)
    assert paper.predicted_gain < 0, "it cares for the batch, not for Goodput"


def test_it_waits_for_neither_throughputs_nor_in_the_papers_form_for_the_noise_scale() -> None:
    """Nothing is measured of any configuration: the batch grows by more micro-batches of the present size."""
    unknown = noise(None, samples=3)
    norms = StepNorms(grad_sq=2.0, noise_trace=3.0, steps=3)
    paper = planner({}, policy="norm-test", norm_test_form="paper", max_global_batch=16)
    assert paper.decide(unknown, START, 0, norms).chosen == of(DP2, START.micro_batch, 8)
    unbiased = planner({}, policy="norm-test", max_global_batch=16)
    waiting = unbiased.decide(unknown, START, 0, norms)
    assert (waiting.chosen, "it needs the noise scale" in waiting.reason) == (START, True)
    assert unbiased.decide(noise(2.5), START, 0, norms).chosen == of(DP2, START.micro_batch, 16)


def test_the_papers_form_compares_workers_if_there_are_several() -> None:
    paper, backend = PlannerConfig(policy="norm-test", norm_test_form="paper"), BackendTraits()
    sources = {source_of_step(paper, backend, of(DP2, 1, 8), step) for step in range(40)}
    assert sources == {"replica"}
    alone = Configuration(layout=Layout(tp=2), micro_batch=1, global_batch=8)
    assert {source_of_step(paper, backend, alone, step) for step in range(20)} == {"microbatch+normlayer"}
    named = paper.model_copy(update={"noise_source": "microbatch"})
    assert source_of_step(named, backend, of(DP2, 1, 8), 7) == "microbatch"
