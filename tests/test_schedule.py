"""Learning rate and betas as functions of tokens and batch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copus.schedule import base_lr, rules_at
from tests.megatron_jobs import tiny_job

JOB = tiny_job(1, global_batch=8, tokens=100_000, lr=1e-2, min_lr=1e-3, warmup_tokens=10_000)


def test_warm_up_and_decay() -> None:
    assert base_lr(JOB, 5_000) == pytest.approx(5e-3)
    assert base_lr(JOB, 10_000) == pytest.approx(1e-2)
    assert base_lr(JOB, 100_000) == pytest.approx(1e-3)
    assert base_lr(JOB, 55_000) == pytest.approx((1e-2 + 1e-3) / 2)
    assert base_lr(JOB, 0) > 0


@given(samples=st.integers(0, 6_000), kappa=st.sampled_from([0.125, 0.5, 1, 2, 16]))
def test_a_batch_scales_lr_by_its_root_and_keeps_the_half_life_of_beta2(samples: int, kappa: float) -> None:
    batch = int(8 * kappa)
    rules, reference = rules_at(JOB, samples, batch), rules_at(JOB, samples, 8)
    assert rules.lr == pytest.approx(reference.lr * math.sqrt(kappa))
    half_life_tokens = [
        batch_tokens * math.log(0.5) / math.log(beta2)
        for batch_tokens, beta2 in ((batch, rules.betas[1]), (8, reference.betas[1]))
    ]
    assert half_life_tokens[0] == pytest.approx(half_life_tokens[1])
    assert rules.betas[0] == 0.9


def test_a_warm_up_shorter_than_a_batch_does_not_overshoot() -> None:
    job = tiny_job(1, global_batch=128, tokens=100_000, lr=1e-2, warmup_tokens=500)
    assert base_lr(job, 0) == 1e-2


def test_both_rules_can_be_turned_off() -> None:
    job = tiny_job(1, global_batch=8, lr_batch_exponent=0.0, beta2_follows_batch=False)
    assert rules_at(job, 100, 64) == rules_at(job, 100, 8)
