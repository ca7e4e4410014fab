"""Training loops of other people, on the tiny model and the random tokens of `tests/megatron_jobs.py`, with a meter in
each. The weights stay as they are, so that all of them see the same gradients."""

import contextlib
from collections.abc import Callable
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


def hf_model() -> Any:
    """The model of the tiny job, with its initial weights."""
    job = tiny_job(1)
    return build_causal_lm(job.model, torch.float32, torch.device("cpu"), job.training.seed)


def world() -> tuple[int, int]:
    """Rank and ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def given() -> dict[str, int]:
    """The batch, said beforehand: then the first step is measured too."""
    return {"micro_batch": MICRO_BATCH, "micro_batches": BATCH // MICRO_BATCH // world()[1]}


def microbatches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's micro-batches of a step."""
    rank, ranks = world()
    first = step * BATCH + rank * (BATCH // ranks)
    return [random_batches(start, MICRO_BATCH) for start in range(first, first + BATCH // ranks, MICRO_BATCH)]


def submitted() -> NoiseScale:
    """What `copus submit` measures: its backend, its choice of sources and its average."""
    ranks = world()[1]
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


def torch_loop(
    wrap: Callable[[Any], Any], divided: bool = True, hooks: bool = True, **options: Any
) -> copus.NoiseMeter:
    """Plain torch, or what `wrap` makes of the model."""
    model = wrap(hf_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meter = copus.NoiseMeter(model, optimizer if hooks else None, **options)
    for step in range(STEPS):
        parts = microbatches(step)
        with contextlib.nullcontext() if hooks else meter.step():
            for index, (tokens, labels) in enumerate(parts):
                is_last = index == len(parts) - 1
                waits = hasattr(model, "no_sync") and not is_last
                with model.no_sync() if waits else contextlib.nullcontext():
                    loss = mean_loss(model, tokens, labels)
                    (loss / len(parts) if divided else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    return meter


def ddp_loop() -> copus.NoiseMeter:
    """DistributedDataParallel."""
    return torch_loop(DistributedDataParallel, **given())


def fsdp_loop() -> copus.NoiseMeter:
    """FSDP2, every layer by itself."""

    def wrap(model: Any) -> Any:
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    return torch_loop(wrap, **given())


def deepspeed_loop(zero: int) -> copus.NoiseMeter:
    """DeepSpeed's engine."""
    import deepspeed

    import copus.backends.deepspeed.upstream  # where there is no GPU, nothing is compiled for minutes

    model = hf_model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.0),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": BATCH // MICRO_BATCH // world()[1],
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1e-3,
        },
    )
    meter = copus.NoiseMeter(engine, **given())
    for step in range(STEPS):
        for tokens, labels in microbatches(step):
            engine.backward(mean_loss(engine, tokens, labels))
            engine.step()
    return meter


def megatron_loop(**layout: int) -> copus.NoiseMeter:
    """megatron-core's own schedule and optimizer."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    backend = backend_of(tiny_job(world()[1], layout))
    chunks, optimizer = backend.built.chunks, backend.built.optimizer
    replicas = layout.get("dp", 1)
    count = BATCH // MICRO_BATCH // replicas
    meter = copus.NoiseMeter(chunks, optimizer, micro_batch=MICRO_BATCH, micro_batches=count)
    replica = parallel_state.get_data_parallel_rank()

    def forward_step(iterator: Any, model: Any) -> Any:
        tokens, labels = next(iterator)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None, labels=labels), lambda losses: (losses.float().mean(), {})

    for step in range(STEPS):
        first = step * BATCH + replica * (BATCH // replicas)
        data = [random_batches(start, MICRO_BATCH) for start in range(first, first + BATCH // replicas, MICRO_BATCH)]
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(data),
            model=chunks[0],
            num_microbatches=count,
            seq_length=16,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        for group in optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        optimizer.step()
    return meter


def figures(meter: copus.NoiseMeter) -> tuple[float, float, float | None, int, list[str]]:
    """What is compared."""
    noise = meter.noise
    meter.close()
    return noise.grad_sq, noise.noise_trace, noise.value, noise.samples, meter.problems


def of_loop(kind: str) -> tuple[float, float, float | None, int, list[str]]:
    """The figures of one loop, by name."""
    if kind == "submit":
        noise = submitted()
        return noise.grad_sq, noise.noise_trace, noise.value, noise.samples, []
    if kind.startswith("deepspeed"):
        return figures(deepspeed_loop(int(kind[-1])))
    if kind.startswith("megatron"):
        return figures(megatron_loop(**{kind[-2:]: 2}))
    return figures({"ddp": ddp_loop, "fsdp": fsdp_loop}[kind]())


def of_loops(kinds: list[str]) -> dict[str, tuple[float, float, float | None, int, list[str]]]:
    """Of several loops in one world."""
    return {kind: of_loop(kind) for kind in kinds}
