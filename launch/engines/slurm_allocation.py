"""Nodes that Slurm has given out already: the allocation of `salloc` or of a batch script that copus is called from.

The command stays with its workers, as on one machine; so `copus profile run` and `copus calibrate` work here too.
"""

import hashlib
import os
import subprocess
import time
from pathlib import Path

from copus.fencing import replace_others
from copus.job import JobConfig, JobError
from copus.parent_death import die_with_parent
from launch.engines.agent import command_line
from launch.engines.base import AttendedEngine
from launch.engines.environment import slurm_environment
from launch.engines.slurm_commands import node_addresses, slurm
from launch.engines.slurm_options import StepOptions
from launch.engines.slurm_step import PROFILE_ONLY, endpoint_of, step_command, step_environment, without_own_packages
from launch.process import module_environment

END_SECONDS = 30.0
"""How long Slurm may take to end a step."""


class SrunEngine(AttendedEngine):
    """One step (`srun`) in the allocation that this command runs in. Run directory and data lie on a file system that
    its nodes share."""

    Options = StepOptions
    options: StepOptions

    def check(self, job: JobConfig) -> None:
        """Raise JobError outside of an allocation, and for more nodes or GPUs than it has."""
        if "SLURM_JOB_ID" not in os.environ:
            raise JobError(
                "launch.engine(srun): this command is in no Slurm allocation (SLURM_JOB_ID is not set): call it from "
                "salloc or from a batch script, or use launch.engine: slurm"
            )
        has = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
        if job.cluster.nodes > has:
            raise JobError(f"cluster.nodes({job.cluster.nodes}) is more than the {has} of Slurm job {_job_id()}")
        gpus, ranks = os.environ.get("SLURM_GPUS_ON_NODE", ""), job.cluster.accelerators_per_node
        if job.cluster.accelerator != "cpu" and gpus.isdigit() and int(gpus) < ranks:
            raise JobError(
                f"cluster.accelerators_per_node({ranks}) is more than the {gpus} GPUs on a node of job {_job_id()}"
            )

    def describe(self, run: Path, job: JobConfig) -> str:
        """The command line of srun, and what its environment has beside this command's own."""
        environment = without_own_packages(self.settings(job) | self._modules(), self.options)
        return command_line(environment, self.command(run, job, "SESSION", profile_only=False))

    def start(self, run: Path, job: JobConfig, lock: int, *, profile_only: bool = False) -> "StepWorkers":
        """Start the step. srun keeps the run locked, and passes a SIGTERM on when this command dies."""
        logs = run / "logs"
        logs.mkdir(exist_ok=True)
        session = f"{_job_id()}.{time.strftime('%Y%m%d-%H%M%S')}-0"
        environment = slurm_environment() | self.settings(job) | self._modules()
        replace_others(run, session)
        with open(logs / f"slurm-{session}.srun.log", "ab") as output:
            srun = subprocess.Popen(
                self.command(run, job, session, profile_only=profile_only),
                env=without_own_packages(environment, self.options),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=die_with_parent(),
            )
        return StepWorkers(srun, logs, session, run, job.cluster.accelerators_per_node)

    def command(self, run: Path, job: JobConfig, session: str, *, profile_only: bool) -> list[str]:
        """The srun of the first nodes of the allocation, with all of their CPUs. It is told which allocation: the
        rest of what `salloc` has put into the environment are options, which would outrank these."""
        nodes = dict(list(node_addresses(os.environ["SLURM_JOB_NODELIST"]).items())[: job.cluster.nodes])
        first = next(iter(nodes))
        endpoint = endpoint_of(self.options, _job_id(), nodes[first]) if len(nodes) > 1 else "127.0.0.1:0"
        addresses = nodes if len(nodes) > 1 else {first: "127.0.0.1"}
        more = [f"--jobid={_job_id()}", f"--job-name={step_name(run)}", f"--nodelist={','.join(nodes)}"]
        step = step_command(run, job, self.options, session, addresses, endpoint, more)
        return [*step, *([PROFILE_ONLY] if profile_only else [])]

    def settings(self, job: JobConfig) -> dict[str, str]:
        """What is set in the workers' environment. On one node they connect by the loopback interface."""
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        alone = {name: os.environ.get(name, "lo") for name in names} if job.cluster.nodes == 1 else {}
        return alone | step_environment(self.options, job)

    def _modules(self) -> dict[str, str]:
        return module_environment(self.options.env.get("PYTHONPATH"))

    def end_workers(self, run: Path) -> bool:
        """Let Slurm end the step. Raises JobError if it does not answer."""
        return kill_step(run)

    def log_files(self, run: Path) -> list[Path]:
        """What each node printed in the newest step."""
        newest = max((run / "logs").glob("slurm-*.srun.log"), key=lambda log: log.stat().st_mtime, default=None)
        if newest is None:
            return []
        session = newest.name.removesuffix(".srun.log")
        return [newest, *sorted((run / "logs").glob(f"{session}.node-*.log"))]


class StepWorkers:
    """The srun of a step, and the logs of its nodes."""

    def __init__(self, srun: subprocess.Popen[bytes], logs: Path, session: str, run: Path, ranks_per_node: int) -> None:
        self.logs = logs
        self._srun, self._session, self._run, self._ranks_per_node = srun, session, run, ranks_per_node

    def poll(self) -> int | None:
        """srun's exit code: 0 when every agent ended with 0."""
        return self._srun.poll()

    def terminate(self) -> None:
        """SIGTERM to srun, which passes it on; the nodes ask for a checkpoint."""
        self._srun.terminate()

    def kill(self) -> None:
        """Let Slurm end the step, and wait until it has."""
        kill_step(self._run)
        try:
            self._srun.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._srun.kill()
            self._srun.wait()

    def failed_rank(self) -> int | None:
        """Not told by srun; the run's events say it."""
        return None

    def error_log(self, rank: int) -> Path | None:
        """`logs/SESSION.node-N/…/attempt_N/LOCAL_RANK/stderr.log` of the last attempt."""
        node, local = divmod(rank, self._ranks_per_node)
        attempts = self.logs.glob(f"slurm-{self._session}.node-{node}/*/attempt_*/{local}/stderr.log")
        return max(attempts, key=lambda path: int(path.parts[-3].removeprefix("attempt_")), default=None)


def step_name(run: Path) -> str:
    """By which a step is told from others of its allocation, from any machine."""
    return f"copus-{hashlib.sha256(os.fsencode(run.absolute())).hexdigest()[:12]}"


def kill_step(run: Path) -> bool:
    """End the step of a run at once, if there is one. Raises JobError if Slurm does not answer."""
    listed = slurm("squeue", "--steps", "--noheader", "--format=%i %j", f"--user={os.getuid()}").splitlines()
    steps = [step for step, _, name in (line.strip().partition(" ") for line in listed) if name == step_name(run)]
    for step in steps:
        slurm("scancel", "--signal=KILL", step)
    return bool(steps)


def _job_id() -> str:
    return os.environ["SLURM_JOB_ID"]
