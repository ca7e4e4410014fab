"""Weights and optimizer state on disk, in megatron's layout-free `torch_dist` format."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from copus.agreement import one_line, together
from copus.backends.megatron import cpu, upstream
from copus.backends.megatron.safe_loading import data_only
from copus.backends.megatron.sharded import metadata, state_dict, unwrap

cpu.before_import()
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing import serialization  # noqa: E402
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import (  # noqa: E402
    FullyParallelSaveStrategyWrapper,
)


def save(folder: Path, chunks: list[Any], optimizer: Any) -> None:
    """Write all that is needed to go on, on any layout. `folder` must exist and be empty; every data parallel rank
    writes a share.

    Raises RankError, on every rank, where any rank could not write.
    """
    with upstream.counted_steps(optimizer):
        state = state_dict(chunks, optimizer, is_loading=False)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(
        serialization.get_default_save_sharded_strategy("torch_dist"), replicas, True
    )
    described = metadata()
    described.pop("dp_cp_group")

    def write() -> None:
        try:
            with _errors_of_first_rank() as errors:
                dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, content_metadata=described)
        except CheckpointException as error:  # raised on every rank; rank 0 knows of whom
            whose = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())
            raise OSError(whose or "a rank could not write") from None
        if errors:
            raise errors[0]

    together(write, (OSError, RuntimeError))


@contextmanager
def _errors_of_first_rank() -> Iterator[list[Exception]]:
    """While it is entered, what goes wrong in the files that rank 0 alone writes is collected instead of raised.

    Megatron tells all ranks of an error in a data file, but not in these: the others would wait for rank 0 for ever.
    """
    errors: list[Exception] = []
    places: list[tuple[Any, str]] = [
        (TorchCommonSaveStrategy, "save_common"),
        (FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    ]
    originals = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, _collecting(original, errors))
    try:
        yield errors
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def _collecting(function: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
            errors.append(error)

    return wrapped


def load(folder: Path, chunks: list[Any], optimizer: Any, optimizer_steps: int) -> None:
    """Read what `save` wrote, on whatever layout, into a built model and optimizer. Nothing in the files is executed:
    raises pickle.UnpicklingError, or RuntimeError of the ranks that met one, where they ask for that."""
    upstream.prime_adam(optimizer)
    state = state_dict(chunks, optimizer, is_loading=True)
    try:
        with data_only():
            loaded = dist_checkpointing.load(
                state, str(folder), sharded_strategy=serialization.get_default_load_sharded_strategy(str(folder))
            )
    except CheckpointException as error:  # no Exception, so nobody further up would see it
        raise RuntimeError(
            "; ".join(f"rank {rank}: {one_line(reason[0])}" for rank, reason in error.failures.items())
        ) from None
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{index}"])
    optimizer.load_state_dict(loaded["optimizer"])
    upstream.set_adam_step(optimizer, optimizer_steps)
