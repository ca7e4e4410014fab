"""What a process of `benchmarks.small_batch_memory` runs, and how it sees the memory of that."""

import gc
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.small_batch_memory import peak
from copus.backends.huggingface import build_causal_lm, mean_loss
from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest, StepRules
from copus.job import JobConfig

Run = Callable[[int], Iterator[int]]
"""Builds a model, yields its number of trained parameters, then trains for that many steps."""


def peak_of(run: Run, steps: int) -> dict[str, Any]:
    """Peak memory of the steps of a run."""
    torch.set_num_threads(1)
    gc.collect()  # what is freed later counts, even if it was there before
    before = _resident_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training = run(steps)
        trained = next(training)
        with torch.profiler.record_function("built"):
            pass
        for _ in training:
            pass
    events = profiler.profiler.kineto_results.events()
    built = next(event.start_ns() for event in events if event.name() == "built")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    at_start = sum(size for time, size in changes if time < built)
    return {
        "trained": trained,
        "allocated_bytes": at_start + peak(size for time, size in changes if time >= built),
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "built_bytes": at_start,
    }


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def _batch(job: JobConfig, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape, generator = (sequences, job.model.seq_len + 1), torch.Generator().manual_seed(0)
    tokens = torch.randint(job.model.vocab, shape, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def full(job: JobConfig) -> Run:
    """Full training by the backend of the job, on the ranks of the default process group."""
    backend_class = find_backend(job.training.backend).load()

    def run(steps: int) -> Iterator[int]:
        backend = backend_class(job, torch.device("cpu"))
        backend.build(job.training.configuration)
        yield job.model.parameters
        rules = StepRules(1e-4, job.training.optimizer.betas_at(1.0))
        for step in range(steps):
            backend.train_step(lambda first, count: _batch(job, count), StepRequest(step, rules))
        backend.release()

    return run


def lora(target_modules: Any, rank: int, job: JobConfig) -> Run:
    """peft's adapters, fp32 as it makes them, on frozen bf16 weights."""
    from peft import LoraConfig, get_peft_model

    sequences = _batch(job, 1)

    def run(steps: int) -> Iterator[int]:
        base = build_causal_lm(job.model, torch.bfloat16, torch.device("cpu"), 0)
        model = get_peft_model(base, LoraConfig(r=rank, target_modules=target_modules, task_type="CAUSAL_LM"))
        adapters = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
        yield sum(param.numel() for param in adapters)
        for _ in range(steps):
            mean_loss(model, *sequences).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run
