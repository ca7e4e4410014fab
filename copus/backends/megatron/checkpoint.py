"""Weights and optimizer state on disk, in megatron's layout-free `torch_dist` format."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from copus.backends.megatron import cpu, upstream
from copus.backends.megatron.sharded import metadata, state_dict, unwrap

cpu.before_import()
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.serialization import (  # noqa: E402
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (  # noqa: E402
    FullyParallelSaveStrategyWrapper,
)


def save(folder: Path, chunks: list[Any], optimizer: Any) -> None:
    """Write all that is needed to go on, on any layout. `folder` must exist and be empty; every data parallel rank
    writes a share."""
    state = state_dict(chunks, optimizer, is_loading=False)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("torch_dist"), replicas, True)
    described = metadata()
    described.pop("dp_cp_group")
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, content_metadata=described)
    dist.barrier()


def load(folder: Path, chunks: list[Any], optimizer: Any, optimizer_steps: int) -> None:
    """Read what `save` wrote, on whatever layout, into a built model and optimizer."""
    upstream.prime_adam(optimizer)
    state = state_dict(chunks, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(
        state, str(folder), sharded_strategy=get_default_load_sharded_strategy(str(folder))
    )
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{index}"])
    optimizer.load_state_dict(loaded["optimizer"])
    upstream.set_adam_step(optimizer, optimizer_steps)
