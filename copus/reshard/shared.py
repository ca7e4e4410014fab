"""Memory that the ranks of one machine read from each other directly, instead of through sockets."""

import contextlib
import mmap
import os
import secrets

import torch
import torch.distributed as dist

from copus.agreement import all_ranks


class SharedBuffer:
    """Bytes of this rank on the host, and those of the ranks that it can read.

    Anonymous files in memory (Linux): they have no path that could be left behind, are not limited by the size of
    /dev/shm, and end with the last process that has them.
    """

    def __init__(self, size: int) -> None:
        """Collective over the default group."""
        name = f"copus-{secrets.token_hex(16)}"
        file = _make_file(name, size)
        self.own = torch.empty(size, dtype=torch.uint8) if file is None else _map(file)
        files = all_ranks(file and (os.getpid(), file, name))
        self.readable = {
            rank: buffer
            for rank, theirs in enumerate(files)
            if theirs and rank != dist.get_rank() and (buffer := _open(*theirs)) is not None
        }
        """By rank: its buffer."""
        readable = all_ranks(set(self.readable))
        self.readers = {rank for rank, whose in enumerate(readable) if dist.get_rank() in whose}
        """Ranks that can read this one's."""
        if file is not None:
            os.close(file)


def _make_file(name: str, size: int) -> int | None:
    """Its descriptor; None where the system has no such files."""
    if not size or not hasattr(os, "memfd_create"):
        return None
    with contextlib.suppress(OSError):
        file = os.memfd_create(name)
        os.ftruncate(file, size)
        return file
    return None


def _open(process: int, file: int, name: str) -> torch.Tensor | None:
    """Another rank's buffer. The name tells it from what has the same numbers on another machine or in another
    container."""
    path = f"/proc/{process}/fd/{file}"
    with contextlib.suppress(OSError):
        if os.readlink(path).startswith(f"/memfd:{name} "):
            opened = os.open(path, os.O_RDWR)
            try:
                return _map(opened)
            finally:
                os.close(opened)
    return None


def _map(file: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)
