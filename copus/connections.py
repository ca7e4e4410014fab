"""The TCP connections of this process, and how to end what waits on them. Linux."""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Connection:
    """One of them."""

    own_port: int
    peer: str
    """Address of the other end."""
    accepted: bool
    """Whether the other end opened it, to a port on which this process listens."""
    _copy: socket.socket

    def shut_down(self) -> None:
        """End every wait on it, at both ends if the other one can be reached."""
        with contextlib.suppress(OSError):  # closed meanwhile
            self._copy.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def tcp_connections() -> Iterator[list[Connection]]:
    """All that are established, as copies that are closed in the end: the originals stay open."""
    connected: list[tuple[socket.socket, int, str]] = []
    listening: set[int] = set()
    with contextlib.ExitStack() as opened:
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):  # closed meanwhile, or not connected
                if not os.readlink(entry).startswith("socket:"):
                    continue
                copy = opened.enter_context(socket.socket(fileno=os.dup(int(entry.name))))
                if copy.type != socket.SOCK_STREAM or copy.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                port = copy.getsockname()[1]
                if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    listening.add(port)
                else:
                    connected.append((copy, port, copy.getpeername()[0].removeprefix("::ffff:")))
        yield [Connection(port, peer, port in listening, copy) for copy, port, peer in connected]
