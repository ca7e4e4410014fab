"""torch's elastic agent (`copus.agent`), which starts, watches and restarts the workers of one node."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from copus.job import JobConfig, JobError
from launch.engines.environment import THREADS

WORKER = ("-m", "copus.worker")
"""What the agent runs, before the run directory."""


def agent_arguments(
    run: Path,
    job: JobConfig,
    *,
    endpoint: str,
    session: str,
    address: str,
    logs: Path,
    worker: Sequence[str] = WORKER,
    backend: str = "c10d",
) -> list[str]:
    """Arguments of `python -m copus.agent` on each node.

    `endpoint` is where the agents meet, HOST:PORT; `session` tells this attempt from others there; `address` is this
    node's, for the others; `backend` is torch's `c10d`, or `bound` (`copus.agent`). What the workers print goes to
    files below `logs`, and to the agent's output, each line after `[rankN]:`.
    """
    return [
        *("--rdzv-backend", backend, "--rdzv-endpoint", endpoint, "--rdzv-id", session),
        *("--local-addr", address, "--nnodes", str(job.cluster.nodes)),
        *("--nproc-per-node", str(job.cluster.accelerators_per_node)),
        *("--max-restarts", str(job.launch.max_restarts)),
        *("--log-dir", str(logs), "--tee", "3"),
        *worker,
        str(run),
    ]


def agent_environment(job: JobConfig, users: Mapping[str, str]) -> dict[str, str]:
    """What the agent and its workers need in their environment, whatever the engine. `users` is the environment that
    the user chose for them: only what is a matter of taste follows it. The rest must not be in a job file
    (`check_environment`)."""
    settings = {
        THREADS: str(job.launch.threads_per_rank),
        # torch 2.13 hosts one store for all restarts, without telling their keys apart: restarted ranks find each
        # other's old addresses ("Connection refused"). Without sharing, every restart has a store of its own.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank${rank}]:",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a folder `profiles` or `launch` where the command was typed would hide ours
    }
    if job.cluster.accelerator == "cpu":
        settings["CUDA_VISIBLE_DEVICES"] = ""  # also where there are GPUs
    else:
        # Megatron's advice: with one queue kernels start in the order of their launch, so that collectives of tensor
        # parallelism begin before the matrix products that hide them. Blackwell, it says, needs it no more.
        settings["CUDA_DEVICE_MAX_CONNECTIONS"] = users.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return settings


def check_environment(job: JobConfig, users: Mapping[str, str], option: str = "env") -> None:
    """Raise JobError for a variable of this option of the engine's that would be overridden."""
    for name, value in agent_environment(job, users).items():
        if users.get(name, value) != value:
            why = f" with cluster.accelerator({job.cluster.accelerator})" if name == "CUDA_VISIBLE_DEVICES" else ""
            raise JobError(f"launch.options.{option}: {name}({users[name]}) would be overridden: it is {value!r}{why}")


def command_line(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """A command with its environment, as it can be pasted into a shell."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), *command])
