"""torch's elastic agent for one machine: `python -m copus.agent …` takes what `torch.distributed.run` takes.

It knows one more `--rdzv-backend`, `loopback`: torch's `c10d`, in a store that no other machine can reach.
"""

from datetime import timedelta

from torch.distributed import run
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from copus.loopback import host_store

NAME = "loopback"
READ_TIMEOUT = timedelta(seconds=60)
"""As torch's `c10d` has it."""


class LoopbackBackend(C10dRendezvousBackend):
    """torch's, by the name that it was asked for."""

    @property
    def name(self) -> str:
        """As in `--rdzv-backend`."""
        return NAME


def meet(parameters: RendezvousParameters) -> RendezvousHandler:
    """The rendezvous of one agent, which hosts its store itself."""
    store = host_store(0, READ_TIMEOUT)
    return create_handler(store, LoopbackBackend(store, parameters.run_id), parameters)


if __name__ == "__main__":
    rendezvous_handler_registry.register(NAME, meet)
    run.main()
