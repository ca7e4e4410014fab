"""What has to hold on an accelerator too, with one rank: the same checks on a CPU (default) and on CUDA (`-m gpu`).

On CUDA they run in this process, on NCCL: a fork of a process that has asked for GPUs cannot use them.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from copus.backends.megatron import groups
from copus.backends.megatron.attention import CausalAttention
from copus.backends.megatron.backend import MegatronBackend
from copus.backends.microbatches import hidden_scores
from copus.backends.step_contract import StepRequest, StepRules
from copus.collectives import RankError
from copus.job import JobConfig, parse_job
from tests.megatron_jobs import configuration, random_batches, tiny_job
from tests.ranks import run_ranks

RULES = StepRules(lr=1e-3, betas=(0.9, 0.95))
STILL = StepRules(lr=0.0, betas=(0.9, 0.95))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def nccl() -> Iterator[None]:
    """A world of one rank on NCCL, in this process."""
    torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
        yield
        dist.destroy_process_group()


@pytest.fixture(params=DEVICES)
def on_device(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a function with a device and more arguments on one rank, with `torch.distributed` set up."""
    device = torch.device(request.param)
    if device.type == "cpu":
        return lambda function, *arguments: run_ranks(1, function, device, *arguments)[0]
    request.getfixturevalue("nccl")

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(device, *arguments)
        finally:
            groups.destroy_groups()  # they are global to the process: the next model starts without

    return call


def built(device: torch.device, job: JobConfig) -> MegatronBackend:
    """The job's backend on a device."""
    backend = MegatronBackend(job, device)
    backend.build(job.training.configuration)
    return backend


def train(backend: MegatronBackend, steps: int, first_sample: int = 0) -> list[float]:
    """Losses of some steps of 8 sequences."""
    return [
        backend.train_step(random_batches, StepRequest(first_sample + 8 * step, RULES)).loss for step in range(steps)
    ]


def losses_of_training(device: torch.device, precision: str) -> list[float]:
    return train(built(device, tiny_job(1, micro_batch=2, precision=precision)), 40)


def test_trains_and_bf16_follows_fp32(on_device) -> None:
    losses = on_device(losses_of_training, "fp32")
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)  # nothing learned yet: the padded vocabulary at random
    assert sum(losses[-5:]) / 5 < 0.97 * losses[0]
    assert on_device(losses_of_training, "bf16")[:20] == pytest.approx(losses[:20], rel=2e-3)  # later they drift apart


def losses_with_moves(device: torch.device, precision: str, zero: int, moves: bool) -> list[float]:
    """12 steps; with moves, to full recomputation and back, with another micro-batch, after 4 and 8 of them."""
    backend = built(device, tiny_job(1, {"zero": zero}, micro_batch=2, precision=precision))
    losses = train(backend, 4)
    if moves:
        assert backend.move(configuration(8, 2, zero=zero, recompute="full")).bytes_moved == 0, "one rank has it all"
    losses += train(backend, 4, 8 * 4)
    if moves:
        backend.move(configuration(8, 4, zero=zero))
    losses += train(backend, 4, 8 * 8)
    return losses


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_moving_to_another_layout_changes_no_loss(on_device, precision: str, zero: int) -> None:
    still = on_device(losses_with_moves, precision, zero, False)
    moved = on_device(losses_with_moves, precision, zero, True)
    assert moved == pytest.approx(still, rel=1e-4 if precision == "fp32" else 2e-3)
    assert len(set(still)) == 12


def step_with_parts(device: torch.device) -> tuple[float, list[float], list[float]]:
    """|g|² of a step of 8 sequences, its parts' norms, and the norms of the same parts as steps of their own."""
    backend = built(device, tiny_job(1, micro_batch=2))
    whole = backend.train_step(random_batches, StepRequest(0, STILL, "microbatch"))
    assert whole.parts is not None
    assert whole.parts.part_size == 2
    backend.move(configuration(2, 2))
    alone = [backend.train_step(random_batches, StepRequest(2 * part, STILL)).grad_sq for part in range(4)]
    return whole.grad_sq, list(whole.parts.squared_norms), alone


def test_part_norms_are_those_of_the_parts_alone(on_device) -> None:
    grad_sq, parts, alone = on_device(step_with_parts)
    assert parts == pytest.approx(alone, rel=1e-4)
    assert grad_sq < sum(parts) / len(parts)  # the norm of a mean is below the mean of the norms


MODELS: dict[str, dict[str, Any]] = {
    "dense": {"qk_norm": "head"},
    "experts": {"experts": 4, "experts_per_token": 2, "expert_hidden": 128, "dense_layers": 1},
    "latent attention": {
        **{"kv_heads": 4, "head_dim": 96},
        "latent_attention": {"query_rank": 64, "kv_rank": 64, "rope_dim": 32, "value_dim": 64},
    },
}


def losses_of_kernels(device: torch.device, kernels: str, precision: str, model: dict[str, Any]) -> list[float]:
    wide = {"hidden": 256, "ffn_hidden": 512, "heads": 4, "kv_heads": 2, "head_dim": 64}
    settings = {"kernels": kernels, "precision": precision, "micro_batch": 2, "global_batch": 8, "tokens": 100_000}
    job = parse_job(
        {
            "name": "kernels",
            "model": {"layers": 4, "seq_len": 16, "vocab": 250, **wide, **model},
            "cluster": {"accelerators_per_node": 1, "accelerator": "h100-sxm"},
            "training": settings,
        }
    )
    return train(built(device, job), 10)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_transformer_engine_trains_as_kernels_of_torch(nccl: None, model: str, precision: str) -> None:
    """The real one; what its modules are for Megatron is tested with stand-ins (`test_transformer_engine.py`)."""
    pytest.importorskip("transformer_engine")
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    losses = []
    for kernels, used in (("torch", "bf16"), ("transformer-engine", precision)):
        losses.append(losses_of_kernels(torch.device("cuda"), kernels, used, MODELS[model]))
        groups.destroy_groups()
    assert losses[1] == pytest.approx(losses[0], rel=3e-3 if precision == "bf16" else 2e-2)


ROOM = 64 * 2**20
"""Bytes beyond what it has that the process may use below: enough for the tiny job, and not for 4,096 sequences."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 24])
def test_attention_of_the_last_tokens_is_that_of_the_same_rows_of_the_whole(device: str, window: int | None) -> None:
    """What a context parallel rank computes for its pieces, gradients of keys included."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(1)
    query, key, value, weights = (
        torch.randn(96, 2, heads, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2, 4)
    )
    config: Any = SimpleNamespace(
        attention_dropout=0.0,
        kv_channels=64,
        softmax_scale=None,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None,
    )
    attention = CausalAttention(config, layer_number=1)
    documents = torch.tensor([[0] * 40 + [1] * 56, [0] * 96], device=device)
    for within_documents in (False, True):
        found = []
        for first, last in ((0, 96), (32, 64)):
            keys = key[:last].clone().requires_grad_()
            rows = torch.arange(first, last, device=device)
            hidden = hidden_scores(documents, rows)[..., :last] if within_documents else None
            context = attention.attend(query[first:last], keys, value[:last], hidden)[32 - first : 64 - first]
            (context * weights[32:64].flatten(2)).sum().backward()
            assert keys.grad is not None
            found.append((context, keys.grad[:64]))
        tolerance = 2e-2 if device == "cuda" else 1e-4
        torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_a_batch_too_large_for_this_gpu_is_taken_back(nccl: None) -> None:
    """An out-of-memory of the real allocator, in a step on trial: the job goes back and on, as if nothing had been."""
    device = torch.device("cuda", 0)
    try:
        alone = built(device, tiny_job(1, micro_batch=2))
        undisturbed = train(alone, 8)
        alone.close()
        backend = built(device, tiny_job(1, micro_batch=2))
        losses = train(backend, 4)
        torch.cuda.empty_cache()
        room = torch.cuda.memory_reserved() + ROOM
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
        backend.move(configuration(4096, 4096))
        with pytest.raises(RankError) as caught:
            backend.train_step(random_batches, StepRequest(32, RULES, on_trial=True))
        assert caught.value.out_of_memory
        backend.recover(configuration(8, 2))
        assert losses + train(backend, 4, 32) == pytest.approx(undisturbed, rel=1e-6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        groups.destroy_groups()
