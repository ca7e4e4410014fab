"""The tiny job of `tests/megatron_jobs.py` on DeepSpeed, and its whole state for comparisons."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.base import Backend
from copus.backends.registry import find_backend
from copus.job import JobConfig, parse_job
from copus.reshard.boxes import Box
from tests.megatron_jobs import SHAPE
from tests.ranks import own_device


def deepspeed_job(zero: int, accelerators: int, model: dict[str, Any] | None = None, **training: Any) -> JobConfig:
    """A data parallel job with 2 sequences in a micro-batch."""
    settings = {"layout": {"dp": accelerators, "zero": zero}, "global_batch": 8, "micro_batch": 2, "tokens": 100_000}
    return parse_job(
        {
            "name": "tiny",
            "model": {**SHAPE, **(model or {})},
            "cluster": {"accelerators_per_node": accelerators},
            "planner": {"policy": "copus", "start": "job"},
            "training": {
                "backend": "deepspeed",
                **settings,
                "optimizer": {"weight_decay": 0.01},
                "evaluate_sequences": 8,
                **training,
            },
        }
    )


def deepspeed_backend(job: JobConfig) -> Backend:
    """The job's backend, built in the configuration that the job starts with."""
    backend: Backend = find_backend("deepspeed").load()(job, own_device())
    backend.build(job.training.configuration)
    return backend


def whole_state(backend: Backend) -> dict[str, np.ndarray]:
    """Every field whole, from the shards of all ranks, as bytes; on rank 0."""
    shards = backend.shard_table(backend.configuration.layout).of_rank(dist.get_rank())
    mine = {place: (shards[place], tensor().clone()) for place, tensor in backend.live_state().items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    covered: dict[str, torch.Tensor] = {}
    for held in everyone:
        for (field, box), tensor in held.values():
            if field.name not in whole:
                whole[field.name] = torch.zeros(field.shape, dtype=getattr(torch, field.dtype))
                covered[field.name] = torch.zeros(field.shape, dtype=torch.bool)
            there = box.slices_in(Box.whole(field.shape))
            whole[field.name][there] = tensor
            covered[field.name][there] = True
    assert all(bool(seen.all()) for seen in covered.values()), "no rank has some part of the state"
    return {name: tensor.view(torch.uint8).numpy() for name, tensor in whole.items()}
