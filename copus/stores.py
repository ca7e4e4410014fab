"""Stores that ranks and agents meet in, which listen on one address alone.

torch's own store listens on every interface, whatever address it is given (`TCPStore`, 2.13); one that is handed a
listening socket does not.
"""

import ipaddress
import socket
from datetime import timedelta

from torch.distributed import TCPStore


def host_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """A store on this port of an address of this machine's, on a free one if it is 0. Raises OSError for a taken
    one, and for an address that is not this machine's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as listener:
        bound_port = listener.getsockname()[1]
        descriptor = listener.detach()  # the store closes it
    return TCPStore(
        address,
        bound_port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=False,
        master_listen_fd=descriptor,
    )


def join_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """The store that another process hosts there, or is about to."""
    return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)


def is_bindable(address: str) -> bool:
    """Whether a store at this address can be kept from listening elsewhere.

    Not where it is a name, which each machine may resolve to something else: Debian's own to 127.0.1.1.
    """
    try:
        return not ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False
