"""Which rank of a layout holds which part of the state, read off the model itself.

The chunks that every pipeline stage of a layout would have are built on torch's meta device, in Megatron's data
parallel wrapper, with process groups that only have a size and a rank. That takes 0.1 s for 70 B parameters and no
memory. The modules say how their weights are cut (`local_tensors`), the wrapper which buckets the distributed optimizer
shares out. Line numbers are those of megatron-core 0.16.1.
"""

import contextlib
import math
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.backends.regions import state_rows
from copus.job import JobConfig, TrainingConfig
from copus.profiling.solo import world_of_one
from copus.reshard.table import Row, ShardTable
from profiles.layout import Layout

cpu.before_import()
from megatron.core.distributed import param_and_grad_buffer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from copus.backends.megatron.local_tensors import LocalTensor, ModelRank, has_master, local_tensors  # noqa: E402
from copus.backends.megatron.model import build_model  # noqa: E402


def owned_ranges(buffers: Iterable[Any], replicas: int) -> Iterator[tuple[int, torch.nn.Parameter, int, int]]:
    """What the distributed optimizer of every replica owns of the parameters in gradient buffers: (replica, parameter,
    start, stop), ranges of flattened parameters. Each bucket is cut into equal shares (distrib_optimizer.py:181)."""
    for buffer in buffers:
        for param, (param_start, param_stop, bucket) in buffer.param_index_map.items():
            bucket_start, bucket_stop = buffer.bucket_indices[bucket]
            share = (bucket_stop - bucket_start) // replicas
            low, high = param_start - bucket_start, param_stop - bucket_start
            for replica in range(low // share, math.ceil(high / share)):
                start, stop = max(replica * share, low), min((replica + 1) * share, high)
                yield replica, param, start - low, stop - low


def shard_table(job: JobConfig, layout: Layout) -> ShardTable:
    """Weights and optimizer state of every rank of a layout. Ranks count tensor, context and data, pipeline; the first
    the fastest. Of the ranks of a stage, etp · ep neighbours share its experts out."""
    stage_ranks, training = layout.tp * layout.cp * layout.dp, job.training
    sharers = layout.expert_tp * layout.ep  # a multiple of tp: ranks so far apart have the same of the model
    tables = []
    for pp_rank in range(layout.pp):
        chunks = _chunks_on_meta(job, layout, pp_rank)
        ranks = np.arange(stage_ranks) + stage_ranks * pp_rank
        for place in range(sharers):
            rank, holders = ModelRank.at(place, layout), ranks[place::sharers]
            local = dict(pair for chunk in chunks for pair in local_tensors(chunk, job.model, rank))
            whole = _whole_rows(local.values(), None if layout.zero else training)
            # Every part of a fused matrix has the means over its rows, which are the same.
            tables.append(ShardTable.of(dict.fromkeys(whole)).on_ranks(holders))
            if not layout.zero:
                continue
            of_experts = [buffer for chunk in chunks for buffer in chunk.expert_parallel_buffers]
            tables.append(ShardTable.of(_sharded_rows(of_experts, local, holders, training)))
            if place < layout.tp:
                of_dense = [buffer for chunk in chunks for buffer in chunk.buffers]
                tables.append(ShardTable.of(_sharded_rows(of_dense, local, ranks[place :: layout.tp], training)))
    return ShardTable.concatenate(tables)


def _whole_rows(tensors: Iterable[LocalTensor], training: TrainingConfig | None) -> Iterator[Row]:
    """Weights and, with `training`, what its optimizer keeps of them."""
    for tensor in tensors:
        for region in tensor.regions:
            box = region.place(region.box)
            yield 0, (region.weight,), box
            if training is not None and tensor.is_trained:
                has = has_master(region, training)
                for row in state_rows(region.weight, box, training.optimizer, has_master=has):
                    yield 0, *row


def _sharded_rows(
    buffers: list[Any], local: dict[torch.Tensor, LocalTensor], ranks: np.ndarray, training: TrainingConfig
) -> Iterator[Row]:
    for replica, param, start, stop in owned_ranges(buffers, len(ranks)):
        for region, part, _, _ in local[param].parts_of_range(start, stop):
            box = region.place(part)
            for row in state_rows(region.weight, box, training.optimizer, has_master=has_master(region, training)):
                yield int(ranks[replica]), *row


@dataclass(frozen=True)
class _StandInGroup:
    """As much of a process group as building a model asks for."""

    ranks: int
    own: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


def _chunks_on_meta(job: JobConfig, layout: Layout, pp_rank: int) -> list[Any]:
    """The model chunks of a pipeline stage as Megatron builds and wraps them, without memory."""
    groups = ProcessGroupCollection()
    replicas = _StandInGroup(layout.cp * layout.dp, 0)
    groups.tp, groups.expt_tp = _StandInGroup(layout.tp, 0), _StandInGroup(layout.expert_tp, 0)
    groups.pp = _StandInGroup(layout.pp, pp_rank)
    groups.cp = _StandInGroup(layout.cp, 0)
    groups.ep = _StandInGroup(layout.ep, 0)
    groups.dp = _StandInGroup(layout.dp, 0)
    sharers = layout.expert_tp * layout.ep
    groups.dp_cp, groups.expt_dp = replicas, _StandInGroup(layout.tp * replicas.ranks // sharers, 0)
    groups.tp_ep = _StandInGroup(sharers, 0)
    groups.tp_cp, groups.tp_dp_cp = groups.tp, replicas  # of the routers, which only run on real groups
    groups.embd = None  # nothing is sent to make the copies of a tied embedding equal
    # Megatron's helpers take every group for one rank if torch has no world.
    world = contextlib.nullcontext() if dist.is_initialized() else world_of_one(1, 0)
    with world, _buffers_on_meta(), torch.device("meta"):
        return build_model(job, layout, None, groups)


@contextlib.contextmanager
def _buffers_on_meta() -> Iterator[None]:
    """While it is entered, Megatron's gradient buffers take no memory, and it logs nothing of them.

    They are put on the current GPU (param_and_grad_buffer.py:796-808), whatever torch's default device is.
    """
    original, log = param_and_grad_buffer.torch, param_and_grad_buffer.log_on_each_pipeline_stage
    stand_in = types.ModuleType("torch")
    stand_in.__getattr__ = lambda name: getattr(original, name)  # type: ignore[method-assign]
    stand_in.cuda = types.SimpleNamespace(current_device=lambda: torch.device("meta"))  # type: ignore[attr-defined]
    param_and_grad_buffer.torch = stand_in
    param_and_grad_buffer.log_on_each_pipeline_stage = lambda *args, **kwargs: None
    try:
        yield
    finally:
        param_and_grad_buffer.torch, param_and_grad_buffer.log_on_each_pipeline_stage = original, log
