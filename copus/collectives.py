"""Collectives that raise one rank's error on every rank, and the plain ones that go with them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from copus.user_errors import one_line

OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's allocator on a CPU
    "CUDA error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "Cuda failure 2 'out of memory'",  # NCCL, of its buffers
    "Failed to CUDA calloc",  # likewise
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Messages of RuntimeErrors that mean a lack of memory: libraries that allocate beside torch have no type for it."""


class RankError(Exception):
    """An error of at least one rank, raised on every rank. The message names the rank and the error."""

    def __init__(self, rank: int, message: str, out_of_memory: bool = False) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank
        self.out_of_memory = out_of_memory
        """Whether that rank ran out of memory."""


class MidCollectiveError(RuntimeError):
    """An error of this rank in the middle of a collective that the other ranks may still wait in. They cannot agree on
    it: this process must end, and the launcher ends the others."""


@contextlib.contextmanager
def no_agreement() -> Iterator[None]:
    """Raise what fails in here as MidCollectiveError, which `run_on_all_ranks` passes through."""
    try:
        yield
    except Exception as error:
        raise MidCollectiveError(one_line(error)) from error


def run_on_all_ranks(
    action: Callable[[], Any], catch: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Any:
    """Run an action on every rank and return this rank's result. Collective over the default group.

    If the action raises one of `catch` on any rank, every rank raises RankError for the first such rank. An action that
    contains collectives must fail between them on all ranks or on none, or within `no_agreement`; the RankError of an
    inner call passes through.
    """
    result, mine = None, None
    try:
        result = action()
    except (RankError, MidCollectiveError):  # agreed on already, further in, or never
        raise
    except catch as error:
        rank = dist.get_rank() if dist.is_initialized() else 0
        mine = (rank, one_line(error), is_out_of_memory(error))
    for failed in all_gather(mine):
        if failed is not None:
            raise RankError(*failed)
    return result


def all_gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank; only this process's if there is no process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_rank0(value: Any) -> list[Any] | None:
    """Every rank's value, in rank order, on rank 0; None elsewhere. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def broadcast_from_rank0(value: Any) -> Any:
    """Rank 0's value, on every rank. Collective; the value of the others is ignored."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory. Only torch's GPU allocator has an exception type for it."""
    if isinstance(error, MidCollectiveError) and error.__cause__ is not None:
        return is_out_of_memory(error.__cause__)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
