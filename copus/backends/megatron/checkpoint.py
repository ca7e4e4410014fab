"""Weights and optimizer state on disk, in megatron's layout-free `torch_dist` format."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from copus.backends.megatron import cpu, upstream
from copus.backends.megatron.built import BuiltModel
from copus.backends.megatron.safe_loading import data_only
from copus.backends.megatron.sharded import metadata, state_dict, unwrap
from copus.collectives import all_gather, run_on_all_ranks
from copus.hardware import room_for_a_copy
from copus.user_errors import one_line

cpu.before_import()
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing import serialization  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest  # noqa: E402
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import (  # noqa: E402
    FullyParallelSaveStrategyWrapper,
)


class Save:
    """All that is needed to go on, on any layout, on its way to disk: planned here, then written, then finished."""

    def __init__(self, folder: Path, built: BuiltModel, copy: bool) -> None:
        """Plan who writes what; every data parallel rank writes a share. Collective. `folder` must exist and be empty.

        With `copy` what is written is the state of now, copied into the memory of the host, and training may go on.
        Raises RankError, on every rank, where any rank could not do its part.
        """
        with upstream.counted_steps(built.optimizer):
            state = state_dict(built.chunks, built.optimizer, is_loading=False)
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(
            serialization.get_default_save_sharded_strategy("torch_dist"), replicas, True
        )
        described = metadata()
        described.pop("dp_cp_group")

        self._request: AsyncRequest = _agreed(
            lambda: dist_checkpointing.save(
                state, str(folder), sharded_strategy=strategy, content_metadata=described, async_sharded_save=True
            )
        )
        # Changed in place below: megatron's writer has this list too, and would keep live tensors for as long.
        self._buckets: list[Any] = self._request.async_fn_args[1] if self._request.async_fn_args else []
        self.files = [name for _, name, _ in self._buckets]
        """What `write` writes on this rank, relative to the folder."""
        self.is_copy = copy and all(all_gather(self._bytes() < room_for_a_copy()))
        """Whether training may go on before `write`. False, on every rank, where the memory of any has no room."""
        _agreed(self._stage)

    def _bytes(self) -> int:
        return sum(tensor.nbytes for _, _, (_, tensors) in self._buckets for _, tensor in tensors)

    def _stage(self) -> None:
        """Bring this rank's share into the memory of the host: from a GPU through pinned memory. On a CPU it is there
        already, and copied if that is wanted."""
        if self._request.preload_fn is None:
            return
        staged = self._request.preload_fn()
        if self.is_copy:
            for (_, _, (_, live)), (_, _, (_, tensors)) in zip(self._buckets, staged, strict=True):
                for index, ((_, original), (item, tensor)) in enumerate(zip(live, tensors, strict=True)):
                    tensors[index] = (item, tensor.clone() if tensor is original else tensor)
        self._buckets[:] = staged

    def write(self) -> None:
        """Write this rank's share. Not collective; what goes wrong is raised by `finish`."""
        if self._request.async_fn is not None:
            self._request.async_fn(*self._request.async_fn_args)
            self._buckets[:] = [None] * len(self._buckets)  # lets go of the copies; the writer counts them once more

    def finish(self) -> None:
        """Write what describes the shares, when every rank has written its own. Collective.

        Raises RankError, on every rank, where any rank could not write.
        """

        def finish() -> None:
            for finalize in self._request.finalize_fns:
                finalize()

        _agreed(finish)


def _agreed(action: Callable[[], Any]) -> Any:
    """`run_on_all_ranks`, for what megatron does to the files of a checkpoint."""

    def act() -> Any:
        try:
            with _errors_of_first_rank() as errors:
                result = action()
        except CheckpointException as error:  # raised on every rank; rank 0 knows of whom
            whose = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())
            raise OSError(whose or "a rank could not write") from None
        if errors:
            raise errors[0]
        return result

    return run_on_all_ranks(act, (OSError, RuntimeError))


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


def load(folder: Path, built: BuiltModel, optimizer_steps: int) -> None:
    """Read what a `Save` wrote, on whatever layout, into a built model and optimizer. Nothing in the files is executed:
    raises pickle.UnpicklingError, or RuntimeError of the ranks that met one, where they ask for that."""
    chunks, optimizer = built.chunks, built.optimizer
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
