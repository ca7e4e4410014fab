"""This machine, through torch's elastic agent (`torch.distributed.run`)."""

import os
import re
import subprocess
import time
from pathlib import Path

from copus.job import JobConfig, JobError
from launch.engines.this_machine import check_this_machine
from launch.process import die_with_parent, python_environment, python_module


class LocalEngine:
    """One agent process, in a session of its own so that a terminal's Ctrl-C reaches only the launcher."""

    def __init__(self, worker: list[str] | None = None) -> None:
        """`worker` is what the agent runs, before the run directory: another program than copus.worker in tests."""
        self._worker = worker or ["-m", "copus.worker"]

    def check(self, job: JobConfig) -> None:
        """Raise JobError where the job needs more than this machine."""
        if job.cluster.nodes != 1:
            raise JobError(f"cluster.nodes({job.cluster.nodes}): launch.engine(local) runs on one machine")
        check_this_machine(job)

    def start(self, run: Path, job: JobConfig, lock: int, *, profile_only: bool = False) -> "LocalWorkers":
        """Start the agent. Raises nothing that the user can mend: a worker that cannot start is seen in its log."""
        session = time.strftime("%Y%m%d-%H%M%S-") + str(os.getpid())
        logs = run / "logs"
        logs.mkdir(exist_ok=True)
        with open(logs / f"{session}.agent.log", "ab") as output:
            agent = subprocess.Popen(
                self.command(run, job, session, profile_only),
                env=self.environment(job),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=die_with_parent(),
            )
        return LocalWorkers(agent, logs, session)

    def command(self, run: Path, job: JobConfig, session: str, profile_only: bool) -> list[str]:
        """The agent's command line. The rendezvous is on the loopback interface, on a port that the system picks."""
        return [
            *python_module("torch.distributed.run"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", session),
            *("--local-addr", "127.0.0.1", "--nnodes", "1"),
            *("--nproc-per-node", str(job.cluster.accelerators_per_node)),
            *("--max-restarts", str(job.launch.max_restarts)),
            *("--log-dir", str(run / "logs"), "--redirects", "3"),
            *self._worker,
            str(run),
            *(["--profile-only"] if profile_only else []),
        ]

    def environment(self, job: JobConfig) -> dict[str, str]:
        """Environment of the agent and the workers. An interface that the user chose for gloo stays."""
        settings = {"OMP_NUM_THREADS": str(job.launch.threads_per_rank)}
        # torch 2.13 hosts one store for all restarts, without telling their keys apart: restarted ranks find each
        # other's old addresses ("Connection refused"). Without sharing, every restart has a store of its own.
        settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if job.cluster.accelerator == "cpu":
            settings["CUDA_VISIBLE_DEVICES"] = ""  # also where there are GPUs
        return {"GLOO_SOCKET_IFNAME": "lo"} | python_environment() | settings


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
        """Kill the agent first, so that it restarts nothing, then its workers, one by one: each has its own session."""
        import psutil

        try:
            family = psutil.Process(self._agent.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._agent.kill()
        for process in family:
            try:
                process.kill()  # psutil looks at the start time too: never a stranger with a recycled id
            except psutil.NoSuchProcess:
                continue
        self._agent.wait()
        psutil.wait_procs(family, timeout=10)

    def failed_rank(self) -> int | None:
        """The rank under "Root Cause" in the agent's last words."""
        text = (self.logs / f"{self._session}.agent.log").read_text(errors="replace")
        match = re.search(r"Root Cause.*?rank\s*:\s*(\d+)", text, flags=re.DOTALL)
        return int(match[1]) if match else None

    def error_log(self, rank: int) -> Path | None:
        """`logs/SESSION_…/attempt_N/RANK/stderr.log` of the last attempt."""
        attempts = self.logs.glob(f"{self._session}_*/attempt_*/{rank}/stderr.log")
        return max(attempts, key=lambda path: int(path.parts[-3].removeprefix("attempt_")), default=None)
