"""A step of a Slurm job: one elastic agent on each of its nodes, by `srun`."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from copus.job import JobConfig
from launch.engines.agent import agent_environment
from launch.engines.base import usual_cpus_per_node
from launch.engines.slurm_options import StepOptions

LAST_AGENT_SECONDS = 35
"""An agent waits 30 s for its workers to checkpoint before it kills them. After this `srun` gives up the nodes that it
hears nothing of: to kill the rest on a failure is not enough where Slurm's daemon of the step is dead."""
NO_USER_SITE = "PYTHONNOUSERSITE"
"""Python's own: what is installed in the user's home (`pip install --user`) is not for every interpreter."""
FIRST_PORT, PORTS = 18_000, 12_000
"""Below the ports that Linux gives away by itself."""
PROFILE_ONLY = "--profile-only"
"""Of a node, after its other arguments: its workers fill the throughput table and end."""


def step_command(
    run: Path,
    job: JobConfig,
    options: StepOptions,
    session: str,
    addresses: Mapping[str, str],
    endpoint: str,
    more: Sequence[str] = (),
) -> list[str]:
    """The `srun` of a step; when one of its agents fails all are ended.

    `addresses` are those of the nodes by their names, the one that hosts the agents' meeting point first; `endpoint` is
    that point. `more` are further options of srun.
    """
    nodes = job.cluster.nodes
    return [
        *("srun", "--export=ALL", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        *(f"--cpus-per-task={_cpus_per_node(options, job)}", "--mpi=none"),
        *("--kill-on-bad-exit=1", f"--wait={LAST_AGENT_SECONDS}", "--open-mode=append"),
        f"--output={run}/logs/slurm-{session}.node-%t.log",
        *more,
        *(option(name, value) for name, value in options.srun.items() if value is not False),
        *options.wrapper,
        *(options.container_python or sys.executable, "-m", "launch.engines.slurm_node", str(run), session, endpoint),
        *(f"{name}={address}" for name, address in addresses.items()),
    ]


def step_environment(options: StepOptions, job: JobConfig) -> dict[str, str]:
    """What the agents and workers have in their environment beside that of the shell. Where they meet on several nodes
    without an `interface`, each node sees for itself which one leads to the others (`slurm_node`)."""
    environment = options.env | agent_environment(job, os.environ | options.env)
    if options.interface:
        environment["GLOO_SOCKET_IFNAME"] = options.interface
    if options.nccl_interface or options.interface:
        environment["NCCL_SOCKET_IFNAME"] = options.nccl_interface or options.interface or ""
    return environment


def without_own_packages(environment: Mapping[str, str], options: StepOptions) -> dict[str, str]:
    """The environment of a step's srun: containers have packages of their own, and get none of those of this machine or
    of the user's home."""
    if options.container_python is None:
        return dict(environment)
    others = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    return {**others, NO_USER_SITE: "1"} | options.env


def _cpus_per_node(options: StepOptions, job: JobConfig) -> int:
    """CPUs that a step takes on each node: all that the node that has the fewest of the allocation has there, unless
    the job file says how many."""
    counts = re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", os.environ.get("SLURM_JOB_CPUS_PER_NODE", ""))  # 64(x2),32
    return options.cpus_per_node or min(map(int, counts), default=0) or usual_cpus_per_node(job)


def endpoint_of(options: StepOptions, job_id: str, address: str) -> str:
    """Where the agents of several nodes meet: on the first one, at a port that jobs which run at the same time hardly
    share."""
    return f"{address}:{options.port or FIRST_PORT + int(job_id) % PORTS}"


def option(name: str, value: str | int | bool) -> str:
    """A long option of a program of Slurm's."""
    return f"--{name}" if value is True else f"--{name}={value}"
