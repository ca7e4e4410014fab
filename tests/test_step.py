"""A step of the Megatron backend: who reads data, and what it refuses to measure wrongly."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from copus.backends.megatron.part_norms import norms, sum_of_squares
from copus.backends.step_contract import StepRequest
from tests.megatron_jobs import RULES, backend_of, random_batches, tiny_job
from tests.ranks import run_ranks


def _read_by_each(layout: dict[str, Any]) -> tuple[list[tuple[int, int]], float]:
    """What this rank reads in a step, and the loss."""
    backend = backend_of(tiny_job(dist.get_world_size(), layout, micro_batch=2))
    read = []

    def batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        read.append((first, count))
        return random_batches(first, count)

    return read, backend.train_step(batches, StepRequest(0, RULES)).loss


@pytest.mark.dist
def test_only_the_ends_of_a_pipeline_read_and_in_order() -> None:
    """Each micro-batch once, by the stage with the embedding and by the one with the output layer."""
    everything = [(0, 2), (2, 2), (4, 2), (6, 2)]
    results = run_ranks(4, _read_by_each, {"pp": 4})
    assert [read for read, _ in results] == [everything, [], [], everything]
    alone = run_ranks(1, _read_by_each, {})
    assert results[0][1] == pytest.approx(alone[0][1], rel=1e-5)


def _refusals() -> list[str]:
    """What is said of a layer that keeps its gradient to itself, and of a model without norms that can be seen."""
    backend = backend_of(tiny_job(1, {}, micro_batch=2))
    part_norms = backend.built.part_norms
    assert part_norms is not None
    part_norms.start("microbatch", backend.configuration, 0.0)
    with pytest.raises(RuntimeError) as unseen:
        part_norms._after_backward(next(backend.built.chunks[0].parameters()))
    part_norms._norm_layers.params.clear()
    with pytest.raises(RuntimeError) as no_norms:
        backend.train_step(random_batches, StepRequest(0, RULES, "normlayer"))
    return [str(unseen.value), str(no_norms.value)]


@pytest.mark.dist
def test_gradients_that_cannot_be_seen_are_an_error_and_not_a_wrong_noise_scale() -> None:
    fused, no_norms = run_ranks(1, _refusals)[0]
    assert "adds to main_grad itself" in fused
    assert "this model has none" in no_norms


def test_norms_are_exact_on_a_cpu() -> None:
    tensors = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (1, 1000, 1024, 3_000_001)]
    exact = sum(float(tensor.double().square().sum()) for tensor in tensors)
    assert float(sum_of_squares(norms(tensors), torch.device("cpu"))) == pytest.approx(exact, rel=1e-8)
    assert float(sum_of_squares([], torch.device("cpu"))) == 0
