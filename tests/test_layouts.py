"""The same job on every layout: equal losses, equal gradient norms, equal parts."""

from typing import Any

import numpy as np
import pytest
import torch

from copus.backends.step_contract import StepRequest
from tests.megatron_jobs import RULES, backend_of, random_batches, tiny_job
from tests.ranks import run_ranks

STEPS = 20
UNTIED: dict[str, Any] = {}
TIED = {"tied_embeddings": True}
GQA = {"kv_heads": 2}


def _train(
    accelerators: int, layout: dict[str, Any], model: dict[str, Any], steps: int
) -> list[tuple[float, float, float]]:
    """Loss, |g|² and mean |g_j|² of the micro-batches, of each step."""
    backend = backend_of(tiny_job(accelerators, layout, model, micro_batch=2))
    seen = []
    for step in range(steps):
        result = backend.train_step(random_batches, StepRequest(8 * step, RULES, "microbatch"))
        assert result.parts is not None
        assert len(result.parts.squared_norms) == 4
        seen.append((result.loss, result.grad_sq, float(np.mean(result.parts.squared_norms))))
    return seen


@pytest.fixture(scope="module")
def one_rank() -> Any:
    """The job on one rank, by model."""
    runs: dict[str, Any] = {}

    def run(model: dict[str, Any]) -> list[tuple[float, float, float]]:
        if str(model) not in runs:
            runs[str(model)] = run_ranks(1, _train, 1, {}, model, STEPS)[0]
        return runs[str(model)]

    return run


@pytest.mark.dist
@pytest.mark.parametrize(
    ("accelerators", "layout", "model"),
    [
        (2, {"tp": 2}, UNTIED),
        (2, {"pp": 2}, UNTIED),
        (2, {"dp": 2}, UNTIED),
        pytest.param(4, {"tp": 2, "pp": 2}, UNTIED, marks=pytest.mark.slow),
        (2, {"dp": 2, "zero": 1}, UNTIED),
        (2, {"tp": 2, "sequence_parallel": True}, UNTIED),
        pytest.param(2, {"tp": 2, "recompute": "full"}, UNTIED, marks=pytest.mark.slow),
        (2, {"pp": 2, "recompute": "selective"}, UNTIED),
        (2, {"pp": 2, "vp": 2}, UNTIED),
        (4, {"tp": 2, "pp": 2, "sequence_parallel": True}, TIED),
        (4, {"pp": 2, "dp": 2, "zero": 1}, TIED),
        pytest.param(2, {"tp": 2}, GQA, marks=pytest.mark.slow),
        pytest.param(8, {"tp": 2, "pp": 2, "dp": 2}, UNTIED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_and_norms_do_not_depend_on_the_layout(
    accelerators: int, layout: dict[str, Any], model: dict[str, Any], one_rank: Any
) -> None:
    expected = np.array(one_rank(model))
    ranks = run_ranks(accelerators, _train, accelerators, layout, model, STEPS)
    assert all(rank == ranks[0] for rank in ranks), "ranks disagree about what they report"
    seen = np.array(ranks[0])
    np.testing.assert_allclose(seen[:, 0], expected[:, 0], rtol=1e-4)
    # Weights are equal at the first step: there the sums must be the same number. Later they drift with rounding.
    np.testing.assert_allclose(seen[0, 1:], expected[0, 1:], rtol=1e-6)
    np.testing.assert_allclose(seen[:, 1:], expected[:, 1:], rtol=2e-2)
    assert expected[-1, 0] < 0.9 * expected[0, 0], "the model has to learn, or equal losses say little"


def _parts(layout: dict[str, Any], source: str, global_batch: int, micro_batch: int) -> tuple[float, list[float], int]:
    """|g|², |g_j|² and part size of one step at the initial weights."""
    accelerators = layout.get("dp", 1) * layout.get("tp", 1) * layout.get("pp", 1)
    job = tiny_job(accelerators, layout, global_batch=global_batch, micro_batch=micro_batch)
    result = backend_of(job).train_step(random_batches, StepRequest(0, RULES, source))
    if result.parts is None:
        return result.grad_sq, [], 0
    return result.grad_sq, list(result.parts.squared_norms), result.parts.part_size


def _brute_force(parts: int, part_size: int) -> list[float]:
    """|g_j|² of every part by torch alone: plain autograd on the unwrapped model."""
    backend = backend_of(tiny_job(1))
    model: Any = backend.built.chunks[0].module
    norms = []
    for part in range(parts):
        tokens, labels = random_batches(part * part_size, part_size)
        loss = model(tokens, None, None, labels=labels).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))
    return norms


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layout", "source", "micro_batch", "parts", "part_size"),
    [
        ({}, "microbatch", 2, 4, 2),
        ({}, "microbatch", 8, 2, 4),  # one part: run as two halves
        ({"tp": 2}, "microbatch", 1, 8, 1),
        ({"pp": 2}, "microbatch", 4, 2, 4),
        ({"dp": 2}, "microbatch", 2, 4, 2),
        ({"dp": 2}, "replica", 2, 2, 4),
        ({"dp": 2, "zero": 1}, "replica", 1, 2, 4),
        ({"tp": 2, "dp": 2, "sequence_parallel": True}, "replica", 4, 2, 4),
    ],
    ids=str,
)
def test_part_norms_are_those_of_plain_autograd(
    layout: dict[str, Any], source: str, micro_batch: int, parts: int, part_size: int
) -> None:
    ranks = layout.get("dp", 1) * layout.get("tp", 1) * layout.get("pp", 1)
    _, seen, size = run_ranks(ranks, _parts, layout, source, 8, micro_batch)[0]
    assert size == part_size
    np.testing.assert_allclose(seen, run_ranks(1, _brute_force, parts, part_size)[0], rtol=1e-5)


@pytest.mark.dist
def test_one_sequence_is_one_part_and_says_nothing() -> None:
    assert run_ranks(1, _parts, {}, "microbatch", 1, 1)[0][1:] == ([], 0)
    assert run_ranks(1, _parts, {}, "replica", 8, 1)[0][1:] == ([], 0)


def _poisoned_step() -> tuple[bool, list[bool], int]:
    """A step whose gradient is not finite: skipped, and the weights stay as they were."""
    backend = backend_of(tiny_job(1))
    param = next(iter(backend.built.chunks[0].parameters()))
    hook = param.register_hook(lambda gradient: gradient * float("nan"))
    before = [each.detach().clone() for each in backend.built.chunks[0].parameters()]
    result = backend.train_step(random_batches, StepRequest(0, RULES))
    hook.remove()
    same = [bool((a == b).all()) for a, b in zip(before, backend.built.chunks[0].parameters(), strict=True)]
    return result.skipped, same, backend.optimizer_steps


@pytest.mark.dist
def test_a_step_that_is_not_finite_is_skipped() -> None:
    skipped, same, optimizer_steps = run_ranks(1, _poisoned_step)[0]
    assert skipped
    assert all(same)
    assert optimizer_steps == 0
