"""One node of a Slurm job: `srun python -m launch.engines.slurm_node RUN SESSION ENDPOINT NODE=ADDRESS …`.

Runs torch's elastic agent; a SIGTERM, by which Slurm takes the node away, asks for a checkpoint. The first of the nodes
hosts the agents' meeting point; a node that is alone meets nobody and listens on the loopback interface only.
"""

import os
import sys
from pathlib import Path

from copus.event_log import EventLog
from copus.events import REQUEUED
from copus.fencing import TOKEN
from copus.job import JobError, load_job
from copus.user_errors import EXIT_CODE, report_failure
from launch.engines.agent import agent_arguments
from launch.engines.node_agent import agent_command, pause_on_sigterm, start_agent
from launch.engines.requeues import REQUEUE
from launch.engines.slurm_step import PROFILE_ONLY
from launch.engines.this_machine import check_interfaces, interface_of, own_address_towards


def main(arguments: list[str]) -> int:
    """Run the agent of this node to its end. Returns its exit code."""
    run, session, endpoint, *nodes = (argument for argument in arguments if argument != PROFILE_ONLY)
    addresses = dict(node.split("=", 1) for node in nodes)
    pause_on_sigterm(Path(run), REQUEUE)
    here = os.environ["SLURMD_NODENAME"]
    job = load_job(Path(run) / "job.yaml")
    try:
        check_interfaces(os.environ, job.cluster.accelerator)
    except JobError as error:
        report_failure(JobError(f"node {here}: {error}"), EventLog(Path(run)), rank=0)
        return EXIT_CODE
    alone = job.cluster.nodes == 1
    other = next((address for name, address in addresses.items() if name != here), None)
    own = (other and own_address_towards(other)) or addresses[here]
    agent = agent_arguments(
        Path(run),
        job,
        endpoint=endpoint,
        session=session,
        address=own,
        logs=Path(run) / "logs" / f"slurm-{session}.node-{os.environ['SLURM_NODEID']}",
        backend="bound",
    )
    hosts = here == next(iter(addresses))
    # An agent that is alone again gives up after this long, and the job goes back into the queue: where Slurm's own
    # daemon of the step dies, nobody else notices.
    settings = f"is_host={int(hosts)},join_timeout={job.launch.timeout_seconds:.0f}"
    profile_only = [argument for argument in arguments if argument == PROFILE_ONLY]
    command = agent_command(*(() if alone else ("--rdzv-conf", settings)), *agent, *profile_only)
    requeued = session.rpartition("-")[2] != "0"
    environment = os.environ | {TOKEN: session} | ({REQUEUED: "1"} if requeued else {})
    if not alone and (
        interface := interface_of(own)
    ):  # gloo would take that of the host's name, which may lead nowhere
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    code = start_agent(command, environment).wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
