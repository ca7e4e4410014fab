"""This machine, through torch's elastic agent (`copus.agent`)."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from copus.fencing import TOKEN, replace_others
from copus.job import JobConfig, JobError
from copus.parent_death import die_with_parent
from launch.engines.agent import WORKER, agent_arguments, agent_environment, command_line
from launch.engines.base import AttendedEngine, EngineOptions
from launch.engines.environment import job_environment
from launch.engines.this_machine import check_interfaces, check_this_machine
from launch.process import kill_family, module_environment, python_module


class LocalWorkers:
    """The agent's process and the logs of its workers."""

    def __init__(self, agent: subprocess.Popen[bytes], logs: Path, session: str) -> None:
        self.logs = logs
        self._agent = agent
        self._session = session

    def poll(self) -> int | None:
        """The agent's exit code: 0 when every worker ended with 0, 1 when one failed."""
        return self._agent.poll()

    def terminate(self) -> None:
        """SIGTERM to the agent, which passes it on, waits 30 s and then kills."""
        self._agent.terminate()

    def kill(self) -> None:
        """Kill the agent and its workers; each of them has its own session."""
        kill_family(self._agent.pid)
        self._agent.wait()

    def failed_rank(self) -> int | None:
        """The rank under "Root Cause" in the agent's last words."""
        return self.root_cause(self.logs / f"{self._session}.agent.log")

    @staticmethod
    def root_cause(log: Path) -> int | None:
        """The rank whose failure came first, in the output of an agent."""
        match = re.search(r"Root Cause.*?rank\s*:\s*(\d+)", log.read_text(errors="replace"), flags=re.DOTALL)
        return int(match[1]) if match else None

    def error_log(self, rank: int) -> Path | None:
        """`logs/SESSION_…/attempt_N/RANK/stderr.log` of the last attempt."""
        attempts = self.logs.glob(f"{self._session}_*/attempt_*/{rank}/stderr.log")
        return max(attempts, key=lambda path: int(path.parts[-3].removeprefix("attempt_")), default=None)


class LocalEngine(AttendedEngine):
    """One agent process, in a session of its own so that a terminal's Ctrl-C reaches only the launcher."""

    Workers: ClassVar[type[LocalWorkers]] = LocalWorkers
    """The handle that it gives."""

    def __init__(self, options: EngineOptions | None = None, worker: Sequence[str] = WORKER) -> None:
        """`worker` is what the agent runs, before the run directory: another program than copus.worker in tests."""
        super().__init__(options)
        self._worker = worker

    def check(self, job: JobConfig) -> None:
        """Raise JobError if the job needs more than this machine has, or an interface that it does not have."""
        if job.cluster.nodes != 1:
            raise JobError(f"cluster.nodes({job.cluster.nodes}): launch.engine(local) runs on one machine")
        check_this_machine(job)
        check_interfaces(self.settings(job), job.cluster.accelerator)

    def describe(self, run: Path, job: JobConfig) -> str:
        """The agent's command line, and what its environment has beside this command's own."""
        return command_line(self.settings(job) | module_environment(), self.command(run, job, "SESSION", False))

    def start(self, run: Path, job: JobConfig, lock: int, *, profile_only: bool = False) -> LocalWorkers:
        """Start the agent, or what stands in its place. Raises nothing that the user can mend: a worker that cannot
        start is seen in its log."""
        session = time.strftime("%Y%m%d-%H%M%S-") + str(os.getpid())
        logs = run / "logs"
        logs.mkdir(exist_ok=True)
        attempt = self.begin_attempt(run, session)
        with open(logs / f"{session}.agent.log", "ab") as output:
            agent = subprocess.Popen(
                self.command(run, job, session, profile_only),
                env=job_environment() | self.settings(job) | module_environment() | attempt,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=die_with_parent(),
            )
        return self.Workers(agent, logs, session)

    def begin_attempt(self, run: Path, session: str) -> dict[str, str]:
        """Let ranks of earlier attempts write no more; the variable by which those of this one are known."""
        replace_others(run, session)
        return {TOKEN: session}

    def command(self, run: Path, job: JobConfig, session: str, profile_only: bool) -> list[str]:
        """The agent's command line. The rendezvous is on the loopback interface, on a port that the system picks."""
        local = "127.0.0.1"
        place = {"backend": "bound", "endpoint": f"{local}:0", "session": session, "address": local}
        arguments = agent_arguments(run, job, **place, logs=run / "logs", worker=self._worker)
        return [*python_module("copus.agent"), *arguments, *(["--profile-only"] if profile_only else [])]

    def settings(self, job: JobConfig) -> dict[str, str]:
        """What is set in the workers' environment. Interfaces that the user chose stay."""
        interfaces = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        return {name: os.environ.get(name, "lo") for name in interfaces} | agent_environment(job, os.environ)

    def end_workers(self, run: Path) -> bool:
        """Kill what keeps the run locked and is not its launcher, and all below: the agent and its workers."""
        import psutil

        lock = str((run / "lock").resolve())
        launcher = (run / "lock").read_text().strip().rpartition(" ")[2]
        has_any = False
        for process in psutil.process_iter():
            try:
                holds = str(process.pid) != launcher and any(file.path == lock for file in process.open_files())
            except psutil.Error:  # gone, or another user's
                continue
            if holds:
                kill_family(process.pid)
                has_any = True
        return has_any

    def log_files(self, run: Path) -> list[Path]:
        """The agent's output, which has that of its workers in it."""
        return sorted((run / "logs").glob("*.agent.log"))[-1:]
