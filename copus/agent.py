"""torch's elastic agent: `python -m copus.agent …` takes the arguments of `torch.distributed.run`.

It differs from torch's own in four ways. It has one more `--rdzv-backend`, `bound`: torch's `c10d`, in a store that
listens on the address of `--rdzv-endpoint` alone, unless that is a name. It restarts no workers after an error that
the user has to fix: the next attempt would fail in the same way. Its workers are told its process id, so that they
stop when it has died. And if their engine says where they meet those of other hosts (`copus.rendezvous`), they have
their ranks from there.
"""

import os
from datetime import timedelta

from torch.distributed import Store, TCPStore, run
from torch.distributed.elastic.agent.server import RunResult, Worker, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api

from copus.rendezvous import read_rendezvous
from copus.stop_request import AGENT
from copus.stores import host_store, is_bindable, join_store
from copus.user_errors import EXIT_CODE

NAME = "bound"
READ_TIMEOUT = timedelta(seconds=60)
"""As torch's `c10d` has it."""


class BoundBackend(C10dRendezvousBackend):
    """torch's, by the name that it was asked for."""

    @property
    def name(self) -> str:
        """As in `--rdzv-backend`."""
        return NAME


def meet(parameters: RendezvousParameters) -> RendezvousHandler:
    """The rendezvous of agents in a store on one address. An agent hosts it if `is_host` says so, or the port is 0."""
    address, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=0)
    hosts = parameters.get_as_bool("is_host", default=port == 0)
    if not hosts:
        store = join_store(address, port, READ_TIMEOUT)
    elif is_bindable(address):
        store = host_store(address, port, READ_TIMEOUT)
    else:
        store = TCPStore(address, port, is_master=True, timeout=READ_TIMEOUT, wait_for_workers=False)
    return create_handler(store, BoundBackend(store, parameters.run_id), parameters)


class Agent(LocalElasticAgent):
    """Gives up its remaining restarts when a worker ends with `EXIT_CODE`; takes ranks from a rendezvous."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode == EXIT_CODE for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        rendezvous = read_rendezvous()
        if rendezvous is None:
            workers: list[Worker] = super()._assign_worker_ranks(store, group_rank, group_world_size, spec)
            return workers
        first, ranks = rendezvous.first_rank, rendezvous.ranks
        return [Worker(local, first + local, first + local, ranks, ranks) for local in range(spec.local_world_size)]


if __name__ == "__main__":
    setattr(
        api, LocalElasticAgent.__name__, Agent
    )  # torch has no option for another agent; its launcher looks this name up
    rendezvous_handler_registry.register(NAME, meet)
    os.environ[AGENT] = str(os.getpid())
    run.main()
