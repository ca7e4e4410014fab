"""The worlds of ranks that a rank of a job is in, one after the other, in one process.

When its engine writes the next rendezvous (`copus.rendezvous`), a rank leaves whatever collective it waits in, and
forms the new world with the ranks that survive and with new ones. Its imports, its CUDA context and the pages of its
data stay.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from copus.connections import tcp_connections
from copus.events import ATTEMPT
from copus.fencing import TOKEN
from copus.rendezvous import FILE, WAIT, Rendezvous, note_waiting, read_rendezvous

POLL_SECONDS = 0.1
LEAVE_SECONDS = 20.0
"""How long a rank may take to leave a world. What has not come along by then ends, and is started anew."""


class Worlds:
    """The worlds of one rank, one after the other."""

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        """A rank that is asked to stop waits for no world."""
        self._stop_requested = stop_requested
        self._current: Rendezvous | None = None

    def enter_first(self, prepare: Callable[[], object]) -> None:
        """Enter the world that this process was started for. If there is none yet `prepare`, and wait for it; a rank
        that has to stop ends."""
        if FILE not in os.environ:
            return
        rendezvous = read_rendezvous()
        if rendezvous is None:
            prepare()
            note_waiting(int(os.environ["LOCAL_RANK"]))
        while rendezvous is None:
            if self._stop_requested():
                sys.exit()
            time.sleep(POLL_SECONDS)
            rendezvous = read_rendezvous()
        self._enter(rendezvous)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which the next rendezvous ends every wait for other ranks, with an error."""
        left = threading.Event()
        watch = threading.Thread(target=self._watch, args=(left,), daemon=True)
        if self._current is not None:
            watch.start()
        try:
            yield
        finally:
            left.set()
            if self._current is not None:
                watch.join()

    def may_outlive(self, error: BaseException) -> bool:
        """Whether an error only means that the world of this process is over."""
        if self._current is None:
            return False
        return read_rendezvous() not in (None, self._current) or is_lost_peer(error)

    @contextlib.contextmanager
    def leaving(self, failure: Exception | None) -> Iterator[None]:
        """A context in which all of the world is let go of; its process group is destroyed at the end."""
        _end_if_stuck()
        if failure is not None:  # gloo's groups hang in their end if they are broken in part
            self._abort()
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        faulthandler.cancel_dump_traceback_later()

    def enter_next(self) -> bool:
        """Wait for the next rendezvous, and enter its world. False if none came in time, or the rank has to stop."""
        if self._current is None:
            return False
        end = time.monotonic() + float(os.environ[WAIT])
        while (newest := read_rendezvous()) in (None, self._current):
            if time.monotonic() >= end or self._stop_requested():
                return False
            time.sleep(POLL_SECONDS)
        assert newest is not None
        self._enter(newest)
        return True

    def _enter(self, rendezvous: Rendezvous) -> None:
        """All else reads this process's place from the environment, like any worker of torch's elastic agent."""
        self._current = rendezvous
        os.environ.update(
            {
                "MASTER_ADDR": rendezvous.address,
                "MASTER_PORT": str(rendezvous.port),
                "RANK": str(rendezvous.first_rank + int(os.environ["LOCAL_RANK"])),
                "WORLD_SIZE": str(rendezvous.ranks),
                TOKEN: rendezvous.token,
                ATTEMPT: str(rendezvous.attempt),
            }
        )

    def _watch(self, left: threading.Event) -> None:
        while not left.wait(POLL_SECONDS):
            if read_rendezvous() not in (None, self._current):
                break
        if not left.is_set():
            _end_if_stuck()
        while not left.is_set():
            self._abort()
            left.wait(POLL_SECONDS)  # then again: a group that was being formed connects later

    def _abort(self) -> None:
        """End every wait for other ranks."""
        assert self._current is not None
        if dist.is_initialized() and dist.get_backend() == "nccl":
            distributed_c10d._abort_process_group()  # there is none afterwards
            return
        # gloo cannot abort. Of a connection both directions have to be shut down: its other end may be frozen.
        with tcp_connections() as connections:
            for connection in connections:
                if connection.peer in self._current.addresses:
                    connection.shut_down()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says no more than that the connection to another rank is gone. A wait that lasted too long may
    be for one that hangs on a host that is there: nothing will be heard of it."""
    message = str(error)
    is_of_network = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in message)
    return is_of_network and "timed out" not in message.lower() and "timeout" not in message.lower()


def _end_if_stuck() -> None:
    """End this process, with a traceback, if it is not out of its world in time; without Python, whose lock the rank
    may hold while it is stuck."""
    faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True)
