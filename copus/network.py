"""The bandwidth between the nodes of a job, measured as it starts.

How fast a configuration is depends on the network more than on anything else that a data sheet may get wrong, and steps
of one layout cannot tell a slow network from slow accelerators. A second of messages can.
"""

import os
import time

import torch
import torch.distributed as dist

from copus.collectives import all_gather
from copus.job import JobConfig
from profiles.accelerator import is_described, node_size, on_network

SECONDS = 0.1
"""How long the message that is timed should take: longer than bursts that a network lets through at once."""
FIRST_BYTES, MOST_BYTES = 1 << 16, 1 << 26
ROUNDS = 3
"""Messages of a size; the fastest counts, since the first one connects, and all else that runs only slows one down."""
ANOTHER_NETWORK = 2.0
"""Factor from the data sheet beyond which the measurement is believed. Nearer to it the data sheet is the better guide:
the cost model's constants say what is reached of its bandwidth."""


def on_measured_network(job: JobConfig, device: torch.device) -> JobConfig:
    """The job with the bandwidth of its network, if it runs on several nodes whose network is another one than its data
    sheet says. A job that names its bandwidth, or an accelerator without a data sheet, stays as it is. Collective over
    the default group."""
    cluster = job.cluster
    if cluster.nodes == 1 or cluster.network_gbit_per_second is not None or not is_described(cluster.accelerator):
        return job
    if node_size(cluster) > cluster.accelerators_per_node:
        return job  # faster links join several nodes: two of them say nothing of the network
    if len(set(all_gather(os.environ.get("LOCAL_WORLD_SIZE")))) > 1:
        return job  # nodes of unequal size: ranks in the same place are not on neighbouring nodes
    measured = gbit_per_second(cluster.accelerators_per_node, device)
    sheet = on_network(cluster).between_nodes.bytes_per_second * cluster.accelerators_per_node * 8 / 1e9
    if sheet / ANOTHER_NETWORK <= measured <= sheet * ANOTHER_NETWORK:
        return job
    there = cluster.model_copy(update={"network_gbit_per_second": float(f"{measured:.2g}")})
    return job.model_copy(update={"cluster": there})


def gbit_per_second(ranks_per_node: int, device: torch.device) -> float:
    """Gbit/s that a node sends to another one over all of its ranks, of the slowest pair of nodes.

    Every rank of node 0 sends messages to the one in its place on node 1, those of 2 to 3, …; of an odd number of nodes
    the last one looks on. One way only: gloo sends and receives in turn. Collective over the default group, whose ranks
    are in the order of their nodes.
    """
    size = FIRST_BYTES
    while (seconds := min(_send(size, ranks_per_node, device) for _ in range(ROUNDS))) < SECONDS and size < MOST_BYTES:
        size *= 2
    return size * ranks_per_node * 8 / 1e9 / seconds


def _send(size: int, ranks_per_node: int, device: torch.device) -> float:
    """Seconds until so many bytes have arrived, on the slowest rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sends = (rank // ranks_per_node) % 2 == 0
    peer = rank + ranks_per_node if sends else rank - ranks_per_node
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    dist.barrier()
    started = time.perf_counter()
    if peer < ranks:
        for request in dist.batch_isend_irecv([dist.P2POp(dist.isend if sends else dist.irecv, message, peer)]):
            request.wait()
        message[-1].item()  # a GPU has it only then
    slowest = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)
