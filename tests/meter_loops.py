"""Training loops of other people, in which a meter measures: plain torch, DDP, FSDP2, DeepSpeed and megatron-core, on
one model and the same random tokens. The weights stay as they are, so that all of them see the same gradients."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import copus
from copus.backends.huggingface import build_causal_lm, mean_loss
from copus.backends.step_contract import StepRequest, StepRules
from copus.noise.run_noise import RunNoise
from planner.sampling import HalfLife, source_of_step
from profiles.noise_scale import NoiseScale
from tests.megatron_jobs import backend_of, configuration, random_batches, tiny_job

STEPS, BATCH, MICRO_BATCH = 8, 8, 2

Microbatch = tuple[torch.Tensor, torch.Tensor]
"""Tokens and labels."""
Loss = Callable[[torch.Tensor], torch.Tensor]
"""What is trained on, of the mean loss of a micro-batch."""


@dataclass(frozen=True)
class Loop:
    """Somebody's training loop."""

    model: Any
    """What a meter is made on, with `optimizer`."""
    optimizer: Any
    step: Callable[[Sequence[Microbatch], Loss], None]
    """An optimizer step on this replica's micro-batches."""
    replica: int
    replicas: int

    def meter(self, count: int, micro_batch: int = MICRO_BATCH) -> copus.NoiseMeter:
        """A meter that is told the batch, so that the first step is measured too."""
        return copus.NoiseMeter(self.model, self.optimizer, micro_batch=micro_batch, micro_batches=count)


def _world() -> tuple[int, int]:
    """Rank and ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _hf_model(shape: dict[str, int] | None) -> Any:
    """The model of the tiny job, with its initial weights."""
    job = tiny_job(1, model=shape)
    return build_causal_lm(job.model, torch.float32, torch.device("cpu"), job.training.seed)


def torch_loop(wrap: Callable[[Any], Any], shape: dict[str, int] | None = None) -> Loop:
    """Plain torch, or what `wrap` makes of the model. Gradients are clipped before every update."""
    model = wrap(_hf_model(shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(parts: Sequence[Microbatch], loss_of: Loss) -> None:
        for index, (tokens, labels) in enumerate(parts):
            waits = hasattr(model, "no_sync") and index < len(parts) - 1
            with model.no_sync() if waits else contextlib.nullcontext():
                (loss_of(mean_loss(model, tokens, labels)) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()

    return Loop(model, optimizer, step, *_world())


def sharded(model: Any) -> Any:
    """A model under FSDP2, every layer by itself."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def deepspeed_loop(zero: int, count: int, shape: dict[str, int] | None = None, micro_batch: int = MICRO_BATCH) -> Loop:
    """DeepSpeed's engine, with `count` micro-batches in a step of a replica."""
    import deepspeed

    import copus.backends.deepspeed.upstream  # noqa: F401 (where there is no GPU, nothing is compiled for minutes)

    model = _hf_model(shape)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.0),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": count,
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1e-3,
        },
    )

    def step(parts: Sequence[Microbatch], loss_of: Loss) -> None:
        for tokens, labels in parts:
            engine.backward(loss_of(mean_loss(engine, tokens, labels)))
            engine.step()

    return Loop(engine, None, step, *_world())


def megatron_loop(layout: dict[str, int], shape: dict[str, int] | None = None) -> Loop:
    """megatron-core's own schedule and optimizer."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from copus.backends.megatron.groups import leave_groups

    leave_groups()  # of a loop before this one, which keeps those that it has
    backend = backend_of(tiny_job(_world()[1], layout, shape))
    chunks, optimizer = backend.built.chunks, backend.built.optimizer

    def step(parts: Sequence[Microbatch], loss_of: Loss) -> None:
        def forward_step(iterator: Any, model: Any) -> Any:
            tokens, labels = next(iterator)
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            return model(tokens, positions, None, labels=labels), lambda losses: (loss_of(losses.float().mean()), {})

        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(parts),
            model=chunks[0],
            num_microbatches=len(parts),
            seq_length=parts[0][0].shape[1],
            micro_batch_size=len(parts[0][0]),
            forward_only=False,
        )
        for group in optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        optimizer.step()

    return Loop(chunks, optimizer, step, parallel_state.get_data_parallel_rank(), layout.get("dp", 1))


def loop_of(kind: str, count: int, shape: dict[str, int] | None = None, micro_batch: int = MICRO_BATCH) -> Loop:
    """The loop of that name. DeepSpeed's ends with its ZeRO stage, megatron-core's with what its ranks are."""
    if kind.startswith("deepspeed"):
        return deepspeed_loop(int(kind[-1]), count, shape, micro_batch)
    if kind.startswith("megatron"):
        return megatron_loop({kind[-2:]: _world()[1]}, shape)
    wrap: dict[str, Callable[[Any], Any]] = {
        "plain": lambda model: model,
        "ddp": DistributedDataParallel,
        "fsdp": sharded,
    }
    return torch_loop(wrap[kind], shape)


def microbatches(loop: Loop, step: int) -> list[Microbatch]:
    """This replica's micro-batches of a step."""
    of_replica = BATCH // loop.replicas
    first = step * BATCH + loop.replica * of_replica
    return [random_batches(start, MICRO_BATCH) for start in range(first, first + of_replica, MICRO_BATCH)]


def replicas_of(kind: str) -> int:
    """Data parallel replicas of a loop in this world."""
    return 1 if kind.startswith("megatron") and not kind.endswith("dp") else _world()[1]


def submitted() -> NoiseScale:
    """What `copus submit` measures: its backend, its choice of sources and its average."""
    ranks = _world()[1]
    job = tiny_job(ranks, {"dp": ranks})
    backend = backend_of(job)
    here = configuration(BATCH, MICRO_BATCH, dp=ranks)
    backend.move(here)
    noise = RunNoise(HalfLife(0, 100))
    for step in range(STEPS):
        source = source_of_step(job.planner, backend.description, here, step)
        request = StepRequest(step * BATCH, StepRules(lr=0.0, betas=(0.9, 0.95), weight_decay=0.0), source)
        noise.update(backend.train_step(random_batches, request), (step + 1) * BATCH, BATCH)
    return noise.estimate()


Figures = tuple[float, float, float | None, int, list[str]]
"""|G|², tr Σ, the noise scale, measured steps, and complaints."""


def of_loop(kind: str) -> Figures:
    """The figures of one loop, by name; `submit` is a job of our own."""
    if kind == "submit":
        noise = submitted()
        return noise.grad_sq, noise.noise_trace, noise.value, noise.samples, []
    count = BATCH // MICRO_BATCH // replicas_of(kind)
    loop = loop_of(kind, count)
    meter = loop.meter(count)
    for step in range(STEPS):
        loop.step(microbatches(loop, step), lambda loss: loss)
    noise = meter.noise
    meter.close()
    return noise.grad_sq, noise.noise_trace, noise.value, noise.samples, meter.problems


def of_loops(kinds: list[str]) -> dict[str, Figures]:
    """Of several loops in one world."""
    return {kind: of_loop(kind) for kind in kinds}
