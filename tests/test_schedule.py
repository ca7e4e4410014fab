"""Learning rate, betas and weight decay as functions of tokens, batch and critical batch."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copus.backends.adamw import adamw_options
from copus.backends.step_contract import StepRules
from copus.checkpoints.trainer_state import TrainerState
from copus.job import JobConfig, JobError
from copus.learning_rate import base_lr, lr_decay
from copus.optimizers import AdamW
from copus.schedule import batch_ratio, rules_at
from tests.megatron_jobs import tiny_job

JOB = tiny_job(1, global_batch=8, tokens=100_000, lr=1e-2, min_lr=1e-3, warmup_tokens=10_000)
BETAS = st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.5), (0.9, 0.85), (0.95, 0.98)])
KAPPAS = st.sampled_from([1 / 64, 0.125, 0.5, 1, 2, 8, 32, 128])


def job_with(**optimizer: Any) -> JobConfig:
    return tiny_job(1, global_batch=8, optimizer=optimizer)


def at(samples: int = 0, **state: Any) -> TrainerState:
    return TrainerState(samples_consumed=samples, **state)


def test_warm_up_and_decay() -> None:
    assert base_lr(JOB, 5_000) == pytest.approx(5e-3)
    assert base_lr(JOB, 10_000) == pytest.approx(1e-2)
    assert base_lr(JOB, 100_000) == pytest.approx(1e-3)
    assert base_lr(JOB, 55_000) == pytest.approx((1e-2 + 1e-3) / 2)
    assert base_lr(JOB, 0) > 0


MEGATRON_STYLES = {
    ("cosine", None): ("cosine", None),
    ("linear", None): ("linear", None),
    ("constant", None): ("constant", None),
    ("inverse-sqrt", None): ("inverse-square-root", None),
    ("wsd", "linear"): ("WSD", "linear"),
    ("wsd", "cosine"): ("WSD", "cosine"),
    ("wsd", "1-sqrt"): ("WSD", "minus_sqrt"),
    ("wsd", "exponential"): ("WSD", "exponential"),
}


@pytest.mark.parametrize(("ours", "megatrons"), MEGATRON_STYLES.items(), ids=str)
def test_every_decay_is_megatrons_of_the_same_name(ours: tuple[str, str | None], megatrons: tuple[str, str]) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    decay, shape = ours
    length = {"cosine": 70_000, "linear": 70_000, "wsd": 25_000}.get(decay)
    schedule = {"warmup_tokens": 10_000, "decay": decay, "decay_shape": shape, "decay_tokens": length}
    job = tiny_job(1, tokens=100_000, lr=1e-2, min_lr=1e-3, **schedule)
    end = 80_000 if decay in ("cosine", "linear") else 100_000  # Megatron's counts from the first step on
    optimizer = SimpleNamespace(param_groups=[])
    theirs = OptimizerParamScheduler(
        *(optimizer, 0.0, 1e-2, 1e-3, 10_000, end, megatrons[0], 0.0, 0.0, 1, "constant"),
        **{"wsd_decay_steps": 25_000, "lr_wsd_decay_style": megatrons[1]},
    )
    for tokens in (5_000, 10_000, 10_001, 40_000, 75_000, 75_001, 90_000, 99_999, 100_000):
        theirs.num_steps = tokens
        assert base_lr(job, tokens) == pytest.approx(theirs.get_lr({}), rel=1e-12), tokens


def test_a_longer_run_with_wsd_stays_at_the_peak_where_the_shorter_one_decayed() -> None:
    short, long = (tiny_job(1, tokens=tokens, decay="wsd", decay_tokens=20_000) for tokens in (100_000, 300_000))
    assert [base_lr(short, tokens) for tokens in (0, 79_999)] == [base_lr(long, tokens) for tokens in (0, 79_999)]
    assert base_lr(short, 100_000) == short.training.min_lr < base_lr(long, 280_000) == long.training.lr
    assert lr_decay(short, 85_000 // 16) == pytest.approx(0.55, abs=0.01), "half of the way, as 1 − √¼"


def test_a_decay_that_is_over_before_the_run_stays_at_its_end() -> None:
    job = tiny_job(1, tokens=100_000, warmup_tokens=10_000, decay="linear", decay_tokens=40_000)
    assert base_lr(job, 30_000) == pytest.approx((job.training.lr + job.training.min_lr) / 2)
    assert base_lr(job, 50_000) == base_lr(job, 100_000) == job.training.min_lr


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"decay": "constant", "decay_tokens": 5}, r"decay_tokens\(5\): training\.decay\(constant\) has no end"),
        ({"decay_shape": "linear"}, r"decay_shape\(linear\) is for training\.decay\(wsd\), not cosine"),
        ({"decay": "inverse-sqrt"}, r"lr · √\(warmup_tokens / tokens\), and training\.warmup_tokens is 0"),
        (
            {"decay": "wsd", "warmup_tokens": 90_000},
            r"warmup_tokens\(90000\) \+ decay_tokens\(20000\) is more than training\.tokens\(100000\)",
        ),
    ],
)
def test_a_decay_without_use_or_room_is_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        tiny_job(1, **training)


@given(samples=st.integers(0, 6_000), kappa=st.sampled_from([0.125, 0.5, 1, 2]))
def test_a_batch_scales_lr_by_its_root_and_keeps_the_half_life_of_beta2(samples: int, kappa: float) -> None:
    batch = int(8 * kappa)
    rules, reference = rules_at(JOB, at(samples), batch), rules_at(JOB, at(samples), 8)
    assert rules.lr == pytest.approx(reference.lr * math.sqrt(kappa))
    half_life_tokens = [
        batch_tokens * math.log(0.5) / math.log(beta2)
        for batch_tokens, beta2 in ((batch, rules.betas[1]), (8, reference.betas[1]))
    ]
    assert half_life_tokens[0] == pytest.approx(half_life_tokens[1])
    assert rules.betas[0] == 0.9


@given(kappa=KAPPAS, exponent=st.sampled_from([0.0, 0.5, 1.0]), weight_decay=st.sampled_from([0.0, 0.1]))
def test_the_weight_decay_per_token_is_the_same_at_every_batch(
    kappa: float, exponent: float, weight_decay: float
) -> None:
    optimizer = AdamW(lr_batch_exponent=exponent, weight_decay=weight_decay)
    per_token = optimizer.lr_factor(kappa) * optimizer.weight_decay_at(kappa) / kappa
    assert per_token == pytest.approx(weight_decay)


@given(betas=BETAS, kappa=KAPPAS)
def test_no_batch_brings_beta2_to_where_updates_have_no_bound(betas: tuple[float, float], kappa: float) -> None:
    beta1, beta2 = AdamW(betas=betas).betas_at(kappa)
    assert beta1**2 < beta2 < 1
    assert beta2 >= min(betas)


@given(gradients=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), kappa=st.sampled_from([4.0, 32.0, 128.0]))
def test_at_the_floor_of_beta2_no_update_exceeds_the_learning_rate(gradients: list[float], kappa: float) -> None:
    beta1, beta2 = AdamW().betas_at(kappa)
    m = v = 0.0
    for gradient in gradients:
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        assert abs(m) <= math.sqrt(v) * (1 + 1e-9) + 1e-150


def test_a_batch_above_the_critical_batch_scales_as_the_critical_batch() -> None:
    assert batch_ratio(JOB, 64, critical_batch=None) == 8
    assert batch_ratio(JOB, 64, critical_batch=100.0) == 8
    assert batch_ratio(JOB, 64, critical_batch=20.0) == 2.5
    assert batch_ratio(job_with(scale_beyond_critical_batch=True), 64, critical_batch=20.0) == 8
    assert rules_at(JOB, at(100, critical_batch=16.0), 64) == rules_at(JOB, at(100), 16)


@given(batch=st.integers(1, 512), critical=st.floats(0.01, 1e6))
def test_the_cap_raises_nothing_and_changes_nothing_up_to_the_reference_batch(batch: int, critical: float) -> None:
    ratio = batch_ratio(JOB, batch, critical)
    assert ratio <= batch / 8
    assert ratio == batch / 8 if batch <= 8 else ratio >= 1


def test_a_warm_up_shorter_than_a_batch_does_not_overshoot() -> None:
    job = tiny_job(1, global_batch=128, tokens=100_000, lr=1e-2, warmup_tokens=500)
    assert base_lr(job, 0) == 1e-2


def test_every_rule_can_be_turned_off() -> None:
    job = job_with(lr_batch_exponent=0.0, beta2_follows_batch=False, weight_decay_follows_batch=False)
    assert rules_at(job, at(100), 64) == rules_at(job, at(100), 8)


@given(
    gradients=st.lists(st.floats(0.01, 10) | st.floats(-10, -0.01), min_size=1, max_size=30),
    beta2s=st.lists(st.sampled_from([0.9, 0.95, 0.992, 0.999, 0.9999]), min_size=30, max_size=30),
    weight_decay=st.sampled_from([0.0, 0.1]),
    epsilon=st.sampled_from([1e-8, 1e-2]),
)
def test_torchs_adamw_is_adam_with_the_right_bias_correction_whatever_beta2_does(
    gradients: list[float], beta2s: list[float], weight_decay: float, epsilon: float
) -> None:
    """Against the closed form: m̂ and v̂ are means of g and g², with the weights that the betas give each step."""
    optimizer = AdamW(epsilon=epsilon, weight_decay=weight_decay)
    param = torch.nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    torchs = torch.optim.AdamW([param], fused=True)
    rules = StepRules(lr=0.01, betas=(0.9, 0.9), beta2_product=1.0)
    expected = 0.5
    for step, (gradient, beta2) in enumerate(zip(gradients, beta2s, strict=False)):
        rules = replace(rules, betas=(0.9, beta2))
        torchs.param_groups[0].update(vars(adamw_options(optimizer, rules, step)))
        param.grad = torch.tensor([gradient], dtype=torch.float64)
        torchs.step()
        rules = replace(rules, beta2_product=rules.beta2_product_before(step) * beta2)

        past = range(step + 1)
        firsts = [0.9 ** (step - index) for index in past]
        seconds = [(1 - beta2s[index]) * math.prod(beta2s[index + 1 : step + 1]) for index in past]
        m = sum(weight * gradients[index] for index, weight in zip(past, firsts, strict=True)) / sum(firsts)
        v = sum(weight * gradients[index] ** 2 for index, weight in zip(past, seconds, strict=True)) / sum(seconds)
        expected -= 0.01 * weight_decay * expected + 0.01 * m / (math.sqrt(v) + epsilon)
        assert param.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_with_a_constant_beta2_torch_gets_the_options_of_the_job() -> None:
    options = adamw_options(AdamW(), StepRules(lr=0.01, betas=(0.9, 0.95)), 1000)
    assert vars(options) == {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
