"""Recover from one rank's out-of-memory without restarting processes.

The other ranks wait for that rank in a collective, and would wait until it times out. A note in the key-value store,
which does not depend on the process groups, tells them the reason; breaking the groups' connections wakes them; then
all ranks form the process group again. A rank whose connection breaks without a note has lost a peer for another
reason: it raises that error, which ends in a restart.
"""

import contextlib
import json
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from copus.collectives import RankError, broadcast_from_rank0, is_out_of_memory
from copus.connections import tcp_connections
from copus.devices import join_world, wait_for
from copus.user_errors import one_line

_POLL_SECONDS = 0.1
"""Interval at which a rank looks for a note while a step is on trial."""
_GRACE_SECONDS = 5.0
"""Time that the store has to answer, beyond the timeout of the process group."""


class Trial:
    """A step that can be undone: until `commit`, no weight has changed on any rank."""

    def __init__(self) -> None:
        self.committed = False
        self.broken = threading.Event()
        """Set before the groups are broken; later results of collectives are invalid."""
        self.breaking = threading.Lock()

    def commit(self) -> None:
        """End the part of the step that can be undone. Call it after a collective that shows that all ranks have their
        gradients. Raises RuntimeError if that collective was broken off."""
        if self.broken.is_set():
            raise RuntimeError("the groups of this step were broken")
        self.committed = True


class World:
    """The default process group over time. Every time that it is formed begins a generation."""

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        """Does not use the process group before the first trial."""
        self._device = device
        self._timeout = timedelta(seconds=timeout_seconds)
        self._store: Any = None
        self._generation = self._trials = 0

    @contextlib.contextmanager
    def trial(self) -> Iterator[Trial]:
        """A context in which a rank that runs out of memory before `Trial.commit` takes the others out of the step.

        Then RankError is raised on every rank; call `reform` next. Other errors are raised unchanged, on the ranks that
        meet them. Collective.
        """
        if self._store is None:
            self._begin()
        # The previous step is committed, but its all-gather of weights may still run. Breaking that off would leave the
        # weights half gathered.
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
            traceback.clear_frames(error.__traceback__)  # frees the tensors that the frames refer to
        else:
            return
        finally:
            over.set()
            watch.join(_GRACE_SECONDS)
        raise agreed

    def reform(self) -> None:
        """Form the default process group again; all other groups are gone. Collective, but needs no working group."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._generation += 1
        store = dist.PrefixStore(f"{self._name}/generation-{self._generation}", self._store)
        join_world(self._device, self._timeout, store=store, rank=self._rank, world_size=self._size)

    def _begin(self) -> None:
        self._store = distributed_c10d._get_default_store()
        self._rank, self._size, self._backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
        # A number of its own, because the store keeps the keys of other worlds of these processes.
        number = broadcast_from_rank0(self._store.add("copus/worlds", 1) if self._rank == 0 else None)
        self._name = f"copus/world-{number}"

    @property
    def _note(self) -> str:
        """Store key, unique per step, so that a rank already in the next step ignores it."""
        return f"{self._name}/out-of-memory-{self._generation}-{self._trials}"

    def _agree_in_time(self, error: Exception, trial: Trial) -> RankError | None:
        """`_agree`, or None if the store does not answer: it waits forever for a process that hangs."""
        agreed: list[RankError | None] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone, and its rank with it
                agreed.append(self._agree(error, trial))

        asks = threading.Thread(target=ask, daemon=True)
        asks.start()
        asks.join(self._timeout.total_seconds() + _GRACE_SECONDS)
        return agreed[0] if agreed else None

    def _agree(self, error: Exception, trial: Trial) -> RankError | None:
        """The error that every rank raises if one ran out of memory and all others have left the step; else None."""
        if is_out_of_memory(error):
            self._store.set(self._note, json.dumps([self._rank, one_line(error)]))
            if self._backend == "nccl":
                # torch's watchdog ends a process that sees a peer abort, so let all ranks read the note first.
                time.sleep(3 * _POLL_SECONDS)
        elif not self._store.check([self._note]):
            return None
        self._break(trial)
        self._store.set(f"{self._note}/{self._rank}", "left")
        try:
            self._store.wait([f"{self._note}/{rank}" for rank in range(self._size)], self._timeout)
        except RuntimeError:  # a rank is beyond the step, or dead
            return None
        rank, message = json.loads(self._store.get(self._note))
        return RankError(rank, message, out_of_memory=True)

    def _watch(self, trial: Trial, over: threading.Event) -> None:
        """Wake this rank as soon as there is a note."""
        with contextlib.suppress(RuntimeError):  # the store is gone, and its rank with it
            while not over.wait(_POLL_SECONDS):
                if self._store.check([self._note]):
                    self._break(trial)
                    return

    def _break(self, trial: Trial) -> None:
        """End every wait in a group of this process, once."""
        with trial.breaking:
            if trial.broken.is_set():
                return
            trial.broken.set()
        if self._backend == "nccl":
            distributed_c10d._abort_process_group()
            return
        # gloo's groups have no abort (torch 2.13: `Backend::abort` does nothing). Shutting a connection down, as the
        # death of a process does, wakes both of its ends.
        _shut_down_accepted(_port(self._store))


def _port(store: Any) -> int | None:
    """The TCP port of a store, or of the one behind it; None for a file."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return getattr(store, "port", None)


def _shut_down_accepted(excluded_port: int | None) -> None:
    """Shut down every TCP connection that this process accepted on a port it listens on, except for one port.

    Of two ranks in a gloo group one has accepted the other's connection, so together the ranks break all of them.
    Connections that this process opened, such as a tracker's to its server, stay.
    """
    with tcp_connections() as connections:
        for connection in connections:
            if connection.accepted and connection.own_port != excluded_port:
                connection.shut_down()
