"""A tiny job and tiny data for tests that train: real megatron-core, random tokens."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron.backend import MegatronBackend
from copus.backends.step_contract import StepRules
from copus.job import JobConfig, parse_job
from profiles.configuration import Configuration
from profiles.layout import Layout
from tests.ranks import own_device

SHAPE = {"layers": 4, "hidden": 32, "ffn_hidden": 48, "heads": 4, "kv_heads": 4, "seq_len": 16, "vocab": 250}
RULES = StepRules(lr=3e-3, betas=(0.9, 0.95))


def tiny_job(
    accelerators: int, layout: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **training: Any
) -> JobConfig:
    """A job on `accelerators` CPU ranks; data parallel unless told otherwise."""
    settings = {"layout": layout or {"dp": accelerators}, "global_batch": 8, "tokens": 100_000}
    return parse_job(
        {
            "name": "tiny",
            "model": {**SHAPE, **(model or {})},
            "cluster": {"accelerators_per_node": accelerators},
            "planner": {"policy": "copus", "start": "job"},
            "training": {**settings, "optimizer": {"weight_decay": 0.01}, "evaluate_sequences": 8, **training},
        }
    )


def random_batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that are a function of their index alone, with something to learn: small tokens are much more
    frequent."""
    rows = []
    for index in range(first, first + count):
        generator = torch.Generator().manual_seed(10_000 + index)
        rows.append((250 * torch.rand(17, generator=generator) ** 4).long())
    tokens = torch.stack(rows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def backend_of(job: JobConfig) -> MegatronBackend:
    """The job's backend, built in the configuration that the job starts with."""
    backend = MegatronBackend(job, own_device())
    backend.build(job.training.configuration)
    return backend


def configuration(global_batch: int, micro_batch: int, **layout: Any) -> Configuration:
    """Short for a Configuration."""
    return Configuration(layout=Layout(**layout), micro_batch=micro_batch, global_batch=global_batch)


def save_checkpoint(backend: Any, folder: Path) -> None:
    """Write the state of a backend into a new folder. Collective."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    save = backend.begin_save(folder, copy=False)
    save.write()
    save.finish()
    dist.barrier()
