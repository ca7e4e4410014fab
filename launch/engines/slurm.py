"""Slurm, through its own programs.

Not through submitit: it pickles Python functions and requeues these; here a requeue is a worker that finds its
checkpoint, and what is left is one `sbatch`.

The batch script (`describe`) runs `launch.engines.slurm_job` on the first node, which runs one elastic agent on each
node by `srun`, and sends the job back into the queue.
"""

import os
import re
import shlex
import shutil
import site
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from copus.durable import write_atomically
from copus.job import JobConfig, JobError
from launch.engines.base import EngineState, QueuedEngine, usual_cpus_per_node
from launch.engines.slurm_commands import ALIVE, QUEUED, cpus_per_gpu, queue_entry, slurm
from launch.engines.slurm_options import SlurmOptions, check_directive
from launch.engines.slurm_step import NO_USER_SITE, step_environment
from launch.engines.ticket import Ticket, read_ticket
from launch.process import module_root

SCRIPT = "slurm.sh"
"""In the run directory: what was submitted."""
TOO_LARGE = ("CPU count per node", "Requested node configuration is not available")
"""sbatch's words for nodes that do not have the CPUs, or other resources, that a job asks for."""


class SlurmEngine(QueuedEngine):
    """`sbatch`, `squeue`, `scontrol` and `scancel` on this machine; run directory and data on a file system that the
    nodes share with it."""

    Options = SlurmOptions
    options: SlurmOptions
    job_noun = "Slurm job"

    def check(self, job: JobConfig) -> None:
        """Raise JobError if the paths of the job cannot be given to Slurm."""
        _check_path("launch.runs", job.launch.runs.expanduser().absolute())

    def ready(self, job: JobConfig) -> None:
        """Raise JobError if Slurm's programs are not on this machine."""
        for program in ("sbatch", "squeue", "scontrol", "scancel"):
            if shutil.which(program) is None:
                raise JobError(f"launch.engine(slurm): {program} is not on the PATH of this machine")

    def describe(self, run: Path, job: JobConfig) -> str:
        """The batch script."""
        _check_path("the run directory", run)
        own = {"job-name": f"copus-{job.name}", "chdir": str(run), "output": f"{run}/logs/slurm-%j.log"}
        return "\n".join(
            ["#!/bin/bash", *self._directives(job, own), "", *self._commands(job), _start(shlex.quote(str(run)))]
        )

    def array_key(self, job: JobConfig) -> str:
        """All that the batch script says but for the run: jobs of equal needs may be an array."""
        return "\n".join([*self._directives(job, {}), *self._commands(job)])

    def describe_array(self, runs: Sequence[Path], job: JobConfig, name: str, at_once: int | None) -> str:
        """The batch script of an array, which finds the run of each task by its index."""
        for run in runs:
            _check_path("the run directory", run)
        limit = "" if at_once is None else f"%{at_once}"
        own = {"job-name": f"copus-{name}", "array": f"0-{len(runs) - 1}{limit}", "output": "/dev/null"}
        return "\n".join(
            [
                *("#!/bin/bash", *self._directives(job, own), ""),
                f"runs=({shlex.join(map(str, runs))})",
                'run="${runs[$SLURM_ARRAY_TASK_ID]}"',
                'cd "$run"',
                'exec >>"logs/slurm-${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}.log" 2>&1',
                *self._commands(job),
                _start('"$run"'),
            ]
        )

    def submit(self, run: Path, job: JobConfig) -> Ticket:
        """`sbatch RUN/slurm.sh`, which takes the whole environment along but for the options of Slurm's programs."""
        return _ticket(self._sbatch([run], job, self.describe(run, job)))

    def submit_array(self, runs: Sequence[Path], job: JobConfig, name: str, at_once: int | None) -> list[Ticket]:
        """`sbatch` of a script with `--array`, which is in every run directory."""
        job_id = self._sbatch(runs, job, self.describe_array(runs, job, name, at_once))
        return [_ticket(f"{job_id}_{index}") for index in range(len(runs))]

    def _sbatch(self, runs: Sequence[Path], job: JobConfig, script: str) -> str:
        """Submit a script, and leave it in the directories of its runs. Returns the job's id."""
        ignored = sorted(name for name in os.environ if name.startswith("SBATCH_"))
        if ignored:
            warnings.warn(f"{', '.join(ignored)}: not used; what the job needs stands in launch.options", stacklevel=3)
        for run in runs:
            (run / "logs").mkdir(exist_ok=True)
            write_atomically(run / SCRIPT, script + "\n")
        try:
            answer = slurm("sbatch", "--parsable", str(runs[0] / SCRIPT)).strip()
        except JobError as error:
            if not any(words in str(error) for words in TOO_LARGE):
                raise
            asked = f"launch.options.cpus_per_node({self._cpus_per_node(job)})"
            raise JobError(f"{error}; {asked} may be more than a node has: set it") from None
        return answer.partition(";")[0]  # a federation's name may follow: its ids are known in all of it

    def job_state(self, ticket: Ticket) -> EngineState:
        """What `squeue` says."""
        name, entry = self.name_of(ticket), queue_entry(ticket.job_id)
        if entry is None:
            return EngineState("ended", f"{name} has ended")
        doing = ALIVE.get(entry.state)
        if doing is None:
            return EngineState("ended", f"{name} has ended: {entry.state}")
        if doing in QUEUED:
            reason = "" if entry.reason == "None" else f": {entry.reason}"  # None: Slurm has not looked at it yet
            return EngineState("queued", f"{name} {doing}{reason}")
        return EngineState("running", f"{name} {doing} on {entry.nodes}")

    def withdraw(self, ticket: Ticket) -> str:
        """`scancel`."""
        slurm("scancel", ticket.job_id)
        return "was cancelled"

    def log_files(self, run: Path) -> list[Path]:
        """The batch script's output, and that of each node in each attempt (`slurm-JOB-ATTEMPT.node-N.log`)."""
        ticket = read_ticket(run)
        if ticket is None:
            return []
        attempts = (run / "logs").glob(f"slurm-{ticket.job_id}-*.node-*.log")
        return [*(run / "logs").glob(f"slurm-{ticket.job_id}.log"), *sorted(attempts, key=_attempt_and_node)]

    def error_log(self, run: Path) -> Path | None:
        """The batch script's output: what started the workers, and why it gave up."""
        return next(iter(self.log_files(run)), None)

    def _directives(self, job: JobConfig, own: Mapping[str, str]) -> list[str]:
        """Those of every job of these needs, and its own."""
        options, ranks = self.options, job.cluster.accelerators_per_node
        asks_gpus = job.cluster.accelerator != "cpu"
        gres = options.gres or (f"gpu:{ranks}" if asks_gpus and options.gpus == "gres" else None)
        settings: dict[str, str | int | bool | None] = {
            **own,
            "nodes": job.cluster.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": self._cpus_per_node(job),
            "gres": gres,
            "gpus-per-node": ranks if asks_gpus and options.gpus == "gpus-per-node" else None,
            "partition": options.partition,
            "account": options.account,
            "qos": options.qos,
            "time": options.time_limit,
            **({} if options.memory is None else {"mem": options.memory}),
            **options.sbatch,
            "requeue": True,
            "signal": f"B:USR1@{options.checkpoint_seconds}",
            "open-mode": "append",
        }
        return [
            f"#SBATCH {_directive(name, value)}"
            for name, value in settings.items()
            if value is not None and value is not False
        ]

    def _cpus_per_node(self, job: JobConfig) -> int:
        """CPUs to ask for on each node: on GPUs as many as the GPUs' share of their node has."""
        if self.options.cpus_per_node:
            return self.options.cpus_per_node
        share = None if job.cluster.accelerator == "cpu" else cpus_per_gpu(self.options.partition)
        return usual_cpus_per_node(job, share)

    def _commands(self, job: JobConfig) -> list[str]:
        """What comes before the start: it is the same for every run of these needs."""
        options = self.options
        environment = step_environment(options, job)
        exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
        if job.cluster.nodes == 1 and not self.options.interface:  # several nodes cannot meet on the loopback interface
            exports += [f'export {name}="${{{name}:-lo}}"' for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
        python = options.python or sys.executable
        # Another interpreter would find strangers among the packages in the user's home, as this one does not.
        if (options.python is not None or not site.ENABLE_USER_SITE) and NO_USER_SITE not in options.env:
            exports.append(f"export {NO_USER_SITE}=1")
        # Another interpreter has copus of its own if this one's lies among packages that are not for it.
        is_own = options.python is None or "site-packages" not in module_root().parts
        root = shlex.quote(str(module_root())) if is_own else ""
        path = f'{root}"${{PYTHONPATH:+:$PYTHONPATH}}"' if root else '"${PYTHONPATH:-}"'
        return [
            "trap '' USR1  # until slurm_job listens: a signal that comes too early must not end it",
            *self.options.setup,
            *exports,
            f"export PYTHONPATH={path}",
            f"python={shlex.quote(python)}",
        ]


def _start(run: str) -> str:
    """The last line of a batch script; `run` as the shell takes it."""
    return f'exec "$python" -m launch.engines.slurm_job {run}'


def _ticket(job_id: str) -> Ticket:
    return Ticket(engine="slurm", job_id=job_id, submitted=time.time())


def _directive(name: str, value: str | int | bool | None) -> str:
    if value is True:
        return f"--{name}"
    text = str(value)
    return f"--{name}={text}" if re.fullmatch(r"[\w./:%@,+=-]+", text) else f'--{name}="{text}"'


def _check_path(where: str, path: Path) -> None:
    try:
        check_directive(where, str(path))
    except ValueError as error:
        raise JobError(f"launch.engine(slurm): {error}") from None


def _attempt_and_node(log: Path) -> tuple[int, int]:
    """From `slurm-JOB-ATTEMPT.node-N.log`."""
    attempt, _, node = log.stem.partition(".node-")
    return int(attempt.rpartition("-")[2]), int(node)
