"""What happened on any rank, known to all: so that all go on, or none."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from copus.job import JobError

OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What RuntimeErrors say: of torch's allocator on a CPU, and on a GPU of libraries that allocate beside it."""


class RankError(Exception):
    """Something went wrong on one rank at least, and every rank knows. The message says where and what."""

    def __init__(self, rank: int, message: str, out_of_memory: bool = False) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank
        self.out_of_memory = out_of_memory
        """Whether that was an out-of-memory."""


def together(action: Callable[[], Any], catch: type[Exception] | tuple[type[Exception], ...] = Exception) -> Any:
    """Run an action on every rank and return its result. Collective over the default group.

    Raises RankError on all ranks where it raised one of `catch` on any: the first such rank's. An action with
    collectives of its own must fail between them only together: a RankError passes through.
    """
    result, mine = None, None
    try:
        result = action()
    except RankError as error:  # agreed on already, further in
        raise error
    except catch as error:
        rank = dist.get_rank() if dist.is_initialized() else 0
        mine = (rank, one_line(error), is_out_of_memory(error))
    for failed in all_ranks(mine):
        if failed is not None:
            raise RankError(*failed)
    return result


def all_ranks(value: Any) -> list[Any]:
    """The value of every rank, on every rank; just this one where there is no process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: the device's, or this process's. Only torch's allocator on a GPU has a type for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def one_line(error: BaseException) -> str:
    """An exception for people: `TypeName: what it says`, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def message_of(error: BaseException) -> str:
    """What the event log says of a failure: what the user has to mend as it stands, which is one line already, and
    anything else by `one_line`."""
    return str(error) if isinstance(error, JobError) else one_line(error)
