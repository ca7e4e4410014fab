"""The parts of a step on DeepSpeed, against gradients that plain torch computes of the same sequences."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus.backends.huggingface import build_causal_lm, mean_loss
from copus.backends.step_contract import Parts, StepRequest
from tests.deepspeed_jobs import deepspeed_backend, deepspeed_job
from tests.megatron_jobs import RULES, backend_of, configuration, random_batches, tiny_job
from tests.ranks import run_ranks

BATCH, FIRST = 8, 40


def _norms(size: int, norms_only: bool = False, precision: str = "fp32") -> list[float]:
    """|g|² of every `size` sequences of the step, alone."""
    job = deepspeed_job(1, 1, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build_causal_lm(job.model, dtype, torch.device("cpu"), job.training.seed)
    found = []
    for start in range(FIRST, FIRST + BATCH, size):
        model.zero_grad()
        mean_loss(model, *random_batches(start, size)).backward()
        chosen = [param for name, param in model.named_parameters() if "norm" in name or not norms_only]
        found.append(sum(float(param.grad.double().square().sum()) for param in chosen))
    return found


def _measure(
    precision: str, zero: int, source: str, micro_batch: int, **training: Any
) -> tuple[float, Parts | None, Parts | None]:
    layout = {"dp": dist.get_world_size(), "zero": zero}
    backend = deepspeed_backend(deepspeed_job(zero, 2, layout=layout, precision=precision, **training))
    backend.move(configuration(BATCH, micro_batch, **layout))
    result = backend.train_step(random_batches, StepRequest(FIRST, RULES, source))
    return result.grad_sq, result.parts, result.norm_layer_parts


def _measure_all(precision: str, stages: list[int], source: str, micro_batch: int) -> list:
    return [_measure(precision, zero, source, micro_batch) for zero in stages]


@pytest.mark.dist
def test_microbatches_and_norm_layers_are_those_of_plain_torch_at_every_stage() -> None:
    shown = run_ranks(2, _measure_all, "fp32", [0, 1, 2, 3], "microbatch+normlayer", 2)
    assert str(shown[0]) == str(shown[1]), "ranks have to agree"
    for grad_sq, parts, norm_layers in shown[0]:
        assert parts.part_size == 2
        assert norm_layers.part_size == 1
        np.testing.assert_allclose(parts.squared_norms, _norms(2), rtol=1e-5)
        np.testing.assert_allclose(norm_layers.squared_norms, _norms(1, norms_only=True), rtol=1e-5)
        assert grad_sq == parts.grad_sq == pytest.approx(_norms(BATCH)[0], rel=1e-5)
        assert norm_layers.grad_sq == pytest.approx(_norms(BATCH, norms_only=True)[0], rel=1e-5)


@pytest.mark.dist
@pytest.mark.slow
def test_replicas_are_those_of_plain_torch() -> None:
    accumulated = run_ranks(2, _measure_all, "fp32", [0, 1, 2, 3], "replica", 2)[0]
    for _, parts, _ in accumulated[:2]:
        assert parts.part_size == 4
        np.testing.assert_allclose(parts.squared_norms, _norms(4), rtol=1e-5)
    assert [parts for _, parts, _ in accumulated[2:]] == [None, None], "these reduce every micro-batch"
    for _, parts, _ in run_ranks(2, _measure_all, "fp32", [2, 3], "replica", 4)[0]:
        np.testing.assert_allclose(parts.squared_norms, _norms(4), rtol=1e-5)


def _measure_overlapped() -> list[float]:
    _, parts, _ = _measure("fp32", 1, "replica", 2, overlap_grad_reduce=True)
    assert parts is not None
    return parts.squared_norms.tolist()


@pytest.mark.dist
@pytest.mark.slow
def test_replicas_are_those_of_plain_torch_if_the_reduction_overlaps() -> None:
    np.testing.assert_allclose(run_ranks(2, _measure_overlapped)[0], _norms(4), rtol=1e-5)


@pytest.mark.dist
@pytest.mark.slow
def test_bf16_sums_its_micro_batches_in_fp32() -> None:
    for _, parts, _ in run_ranks(2, _measure_all, "bf16", [1], "replica", 2)[0]:
        np.testing.assert_allclose(parts.squared_norms, _norms(4, precision="bf16"), rtol=1e-2)
    for _, parts, _ in run_ranks(2, _measure_all, "bf16", [1, 2, 3], "microbatch", 2)[0]:
        np.testing.assert_allclose(parts.squared_norms, _norms(2, precision="bf16"), rtol=1e-5)


def _measure_megatron(source: str, micro_batch: int) -> tuple[float, Parts | None, Parts | None]:
    backend = backend_of(tiny_job(2, {"dp": 2}))
    backend.move(configuration(BATCH, micro_batch, dp=2))
    result = backend.train_step(random_batches, StepRequest(FIRST, RULES, source))
    return result.grad_sq, result.parts, result.norm_layer_parts


@pytest.mark.dist
def test_megatron_measures_the_same() -> None:
    """Both begin with the same weights. The norm layers' own |g|² is that of the mean gradient."""
    source = "microbatch+normlayer"
    megatron_sq, megatron_parts, megatron_norm_layers = run_ranks(2, _measure_megatron, source, 2)[0]
    ((grad_sq, parts, norm_layers),) = run_ranks(2, _measure_all, "fp32", [3], source, 2)[0]
    assert grad_sq == pytest.approx(megatron_sq, rel=1e-5)
    for ours, theirs in ((parts, megatron_parts), (norm_layers, megatron_norm_layers)):
        assert ours.grad_sq == pytest.approx(theirs.grad_sq, rel=1e-5)
        np.testing.assert_allclose(ours.squared_norms, theirs.squared_norms, rtol=1e-5)
