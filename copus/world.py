"""Leaving the process group and forming it anew, in the same processes: the way out of a step that broke on one rank.

The others wait for it in a collective. Aborting the groups closes the connections, which wakes them with an error
(gloo); a note in the store, which is not part of the groups, tells them what it was. NCCL's own watchdog ends a waiting
rank instead, and the engine restarts the job.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_NOTE = "copus/out-of-memory"


class World:
    """The default process group over time: a generation for each time it was formed."""

    def __init__(self) -> None:
        """The process group must be there."""
        self._store: Any = distributed_c10d._get_default_store()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._backend = dist.get_backend()
        self._generation = 0

    def out_of_memory(self, error: BaseException) -> str | None:
        """What to make of an error in a step: where there was no memory left; None where it is something else.

        A rank without memory tells the others.
        """
        note = f"{_NOTE}/{self._generation}"
        if isinstance(error, torch.OutOfMemoryError):
            self._store.set(note, f"rank {self._rank}: {' '.join(str(error).split())}")
        return self._store.get(note).decode() if self._store.check([note]) else None

    def leave(self) -> None:
        """Abort every group that there is: whoever waits in one is woken. Must come before any of them is forgotten."""
        distributed_c10d._abort_process_group()

    def form_anew(self, timeout_seconds: float, device: torch.device) -> None:
        """Make a new default group of the same ranks, after `leave`. Collective."""
        self._generation += 1
        dist.init_process_group(
            self._backend,
            store=dist.PrefixStore(f"generation-{self._generation}", self._store),
            rank=self._rank,
            world_size=self._size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
