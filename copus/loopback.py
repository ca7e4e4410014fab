"""Where the ranks of one machine meet: a store that no other machine can reach.

torch's own store listens on every interface, whatever address it is given (`TCPStore`, 2.13); one that is handed a
listening socket does not.
"""

import socket
from datetime import timedelta

from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"


def host_store(port: int, timeout: timedelta) -> TCPStore:
    """A store on this port of the loopback interface, on a free one where it is 0. Raises OSError for a taken one."""
    with socket.create_server((LOOPBACK, port)) as listener:
        bound_port = listener.getsockname()[1]
        descriptor = listener.detach()  # the store closes it
    return TCPStore(
        LOOPBACK,
        bound_port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=False,
        master_listen_fd=descriptor,
    )


def join_store(port: int, timeout: timedelta) -> TCPStore:
    """The store that another process of this machine hosts, or is about to."""
    return TCPStore(LOOPBACK, port, is_master=False, timeout=timeout, wait_for_workers=False)
