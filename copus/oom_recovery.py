"""Recover from one rank's out-of-memory without restarting processes.

The other ranks wait for that rank in a collective, and would until it times out. A note in the key-value store, which
does not depend on the process groups, tells them why; breaking the groups' connections wakes them; then all ranks form
the process group again. A rank whose connection breaks and that finds no note has lost a peer for another reason: that
error is raised as it is and ends in a restart.
"""

import contextlib
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from copus.collectives import RankError, broadcast_from_rank0, is_out_of_memory
from copus.devices import join_world, wait_for
from copus.user_errors import one_line

_POLL_SECONDS = 0.1
"""How often a rank looks for a note while a step is on trial."""
_GRACE_SECONDS = 5.0
"""What the store has for its answers, beyond the timeout of the process group."""


class Trial:
    """A step that no rank has taken before all have their gradients: until `commit` no weight has changed anywhere."""

    def __init__(self) -> None:
        self.committed = False
        self.broken = threading.Event()
        """Set before the groups are broken: what a collective gave after that is no result."""
        self.breaking = threading.Lock()

    def commit(self) -> None:
        """From here on the step cannot be taken back. Call it when a collective over all ranks has told that each has
        its gradients. Raises RuntimeError where that collective was broken off."""
        if self.broken.is_set():
            raise RuntimeError("the groups of this step were broken")
        self.committed = True


class World:
    """The default process group over time: a generation for each time that it was formed."""

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        """Nothing is asked of the process group before the first trial."""
        self._device = device
        self._timeout = timedelta(seconds=timeout_seconds)
        self._store: Any = None
        self._generation = self._trials = 0

    @contextlib.contextmanager
    def trial(self) -> Iterator[Trial]:
        """While it is entered, a rank that runs out of memory before `Trial.commit` takes the others out with it.

        RankError is raised then, on every rank, and `reform` has to come next. Whatever else goes wrong is raised as it
        is, on the ranks that meet it. Collective.
        """
        if self._store is None:
            self._begin()
        # The step before was committed, but its all-gather of weights may still run: to break it off now would leave
        # them half gathered.
        wait_for(self._device)
        self._trials += 1
        trial = Trial()
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(trial, over), daemon=True)
        watch.start()
        try:
            yield trial
        except Exception as error:
            agreed = None if trial.committed else self._agree_in_time(error, trial)
            if agreed is None:
                raise
            traceback.clear_frames(error.__traceback__)  # what they refer to is the memory that is lacking
        else:
            return
        finally:
            over.set()
            watch.join(_GRACE_SECONDS)
        raise agreed

    def reform(self) -> None:
        """Form the default process group again. Every other group is gone. Collective, and needs no group itself."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._generation += 1
        store = dist.PrefixStore(f"{self._name}/generation-{self._generation}", self._store)
        join_world(self._device, self._timeout, store=store, rank=self._rank, world_size=self._size)

    def _begin(self) -> None:
        self._store = distributed_c10d._get_default_store()
        self._rank, self._size, self._backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
        # Of its own among all worlds of these processes: what one left in the store means nothing to another.
        number = broadcast_from_rank0(self._store.add("copus/worlds", 1) if self._rank == 0 else None)
        self._name = f"copus/world-{number}"

    @property
    def _note(self) -> str:
        """Store key, unique per step, so that a rank already in the next step ignores it."""
        return f"{self._name}/out-of-memory-{self._generation}-{self._trials}"

    def _agree_in_time(self, error: Exception, trial: Trial) -> RankError | None:
        """The same as `_agree`, and None where the store does not answer: it waits forever for a process that hangs."""
        found: list[RankError | None] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone, and its rank with it
                found.append(self._agree(error, trial))

        asks = threading.Thread(target=ask, daemon=True)
        asks.start()
        asks.join(self._timeout.total_seconds() + _GRACE_SECONDS)
        return found[0] if found else None

    def _agree(self, error: Exception, trial: Trial) -> RankError | None:
        """What every rank raises where one of them ran out of memory and all the others have left the step too."""
        if is_out_of_memory(error):
            self._store.set(self._note, json.dumps([self._rank, one_line(error)]))
            if self._backend == "nccl":
                # Whoever sees a peer abort is ended by torch's own watchdog: all read the note and abort themselves.
                time.sleep(3 * _POLL_SECONDS)
        elif not self._store.check([self._note]):
            return None
        self._break(trial)
        self._store.set(f"{self._note}/{self._rank}", "left")
        try:
            self._store.wait([f"{self._note}/{rank}" for rank in range(self._size)], self._timeout)
        except RuntimeError:  # somebody is beyond the step, or dead
            return None
        rank, message = json.loads(self._store.get(self._note))
        return RankError(rank, message, out_of_memory=True)

    def _watch(self, trial: Trial, over: threading.Event) -> None:
        """Wake this rank when there is a note."""
        with contextlib.suppress(RuntimeError):  # the store is gone, and its rank with it
            while not over.wait(_POLL_SECONDS):
                if self._store.check([self._note]):
                    self._break(trial)
                    return

    def _break(self, trial: Trial) -> None:
        """End what waits in any group of this process, once."""
        with trial.breaking:
            if trial.broken.is_set():
                return
            trial.broken.set()
        if self._backend == "nccl":
            distributed_c10d._abort_process_group()
            return
        # gloo's groups have no abort (torch 2.13: `Backend::abort` does nothing). What wakes both ends of a connection
        # is what the death of a process would do to it.
        _shut_down_accepted(_port(self._store))


def _port(store: Any) -> int | None:
    """The TCP port of a store, or of the one behind it; None where it is a file."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return getattr(store, "port", None)


def _shut_down_accepted(excluded_port: int | None) -> None:
    """Shut down every TCP connection that this process accepted on a port it listens on, but for one port. Linux.

    Of any two ranks in a gloo group one has accepted the other's connection, so together the ranks break them all.
    What a tracker has opened to its server is none of them.
    """
    connected: list[tuple[socket.socket, int]] = []
    listening: set[int] = set()
    with contextlib.ExitStack() as opened:
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):  # closed meanwhile, or not connected
                if not os.readlink(entry).startswith("socket:"):
                    continue
                each = opened.enter_context(socket.socket(fileno=os.dup(int(entry.name))))  # the original stays open
                if each.type != socket.SOCK_STREAM or each.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                port = each.getsockname()[1]
                if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    listening.add(port)
                else:
                    connected.append((each, port))
        for each, port in connected:
            if port in listening and port != excluded_port:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
