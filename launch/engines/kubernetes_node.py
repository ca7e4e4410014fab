"""One pod of a TrainJob: `python -m launch.engines.kubernetes_node RUN`.

Runs torch's elastic agent with what the torch runtime of Kubeflow Trainer puts into the environment (PET_…), and ends
with 0 only if another start is of no use: the run was trained to the end, the user stopped it (`RUN/stop`), or the user
has to fix something (the run's events say which). Anything else, also a pod that is evicted, ends with another code on
all nodes: Kubernetes starts them again, up to the limit of the runtime, and the workers go on from the newest
checkpoint.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from copus.events import REQUEUED, EventLog
from copus.job import JobConfig, JobError, load_job
from copus.user_errors import report_failure
from launch.engines.agent import agent_arguments
from launch.engines.this_machine import check_interfaces
from launch.engines.ticket import read_ticket
from launch.follow import Follower
from launch.process import die_with_parent, module_environment, python_module
from launch.run_directory import lock_run, request_pause
from launch.status import RunStatus

AGAIN = 75
"""Exit code where the run has to go on: EX_TEMPFAIL of sysexits.h."""
EVICTED = "evicted\n"
"""What is in RUN/stop where the run goes on later; the user's stop has nothing in it."""
SECONDS = 120.0
"""How long to wait for the launcher, which has the run's lock until it has written the job's name down."""


def main(arguments: list[str]) -> int:
    """One attempt on this node. Returns the exit code of the container."""
    run, name = Path(arguments[0]), os.environ["COPUS_JOB"]
    rank = int(os.environ.get("PET_NODE_RANK", 0))
    try:
        job = load_job(run / "job.yaml")
        _wait_for_ticket(run, name)
        if rank:
            return Node(run, job, name, rank).run()
        with lock_run(run, f"TrainJob {name}", SECONDS):
            if not _stopped_by_user(run):
                (run / "stop").unlink(missing_ok=True)
            return Node(run, job, name, rank).run()
    except JobError as error:
        print(f"copus: {error}", file=sys.stderr)
        return 2


class Node:
    """The agent of one node, from its start to what follows from its end."""

    def __init__(self, run: Path, job: JobConfig, name: str, rank: int) -> None:
        """Takes SIGTERM over: the agent would give its workers 30 seconds, and a checkpoint may take longer."""
        self._run, self._job, self._name, self._rank = run, job, name, rank
        self._log = run / "logs" / f"{name}.node-{rank}.log"
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def run(self) -> int:
        """Run the agent; its output goes to the pod's log and to the run's."""
        if _stopped_by_user(self._run):
            return 0
        try:
            check_interfaces(self.environment(), self._job.cluster.accelerator)
        except JobError as error:
            report_failure(JobError(f"node {self._rank}: {error}"), EventLog(self._run), rank=0)
            return 0
        follower, status = Follower(self._run), RunStatus()
        status.update(follower.read())
        status.forget_ending()  # that of an attempt before
        agent = subprocess.Popen(
            self.command(),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent(),
        )
        assert agent.stdout is not None
        with open(self._log, "ab", buffering=0) as log:
            for line in agent.stdout:
                log.write(line)
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
        code = agent.wait()
        status.update(follower.read())
        over = code == 0 and status.end is not None and status.end.reason != "interrupted"
        over = over or (status.failure is not None and status.failure.user_error)
        return 0 if over or (code == 0 and _stopped_by_user(self._run)) else AGAIN

    def command(self) -> list[str]:
        """The agent's command line, from what the runtime has put into the environment."""
        logs = self._run / "logs" / f"{self._name}.node-{self._rank}"
        common: dict[str, Any] = {"session": self._name, "logs": logs}
        if self._job.cluster.nodes == 1:  # then nothing has to be reached from elsewhere
            here = "127.0.0.1"
            place: dict[str, Any] = {"backend": "loopback", "endpoint": f"{here}:0", "address": here}
            return [*python_module("copus.agent"), *agent_arguments(self._run, self._job, **common, **place)]
        endpoint = f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}"
        place = {"endpoint": endpoint, "address": os.environ["POD_IP"]}
        # An agent that is alone again gives up after this long, and its pod is started anew with the others.
        settings = f"is_host={int(self._rank == 0)},join_timeout={self._job.launch.timeout_seconds:.0f}"
        arguments = agent_arguments(self._run, self._job, **common, **place)
        return [*python_module("copus.agent", "--rdzv-conf", settings), *arguments]

    def environment(self) -> dict[str, str]:
        """The agent's. A log of this job means that Kubernetes has started the pod before."""
        interfaces = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
        requeued = {REQUEUED: "1"} if self._log.exists() else {}
        alone = interfaces if self._job.cluster.nodes == 1 else {}
        return alone | os.environ | module_environment() | requeued

    def _on_sigterm(self, number: int, frame: Any) -> None:
        """The pod is evicted: ask all workers for a checkpoint. A request of the user's to stop for good stays."""
        try:
            request_pause(self._run, EVICTED)
        except OSError as error:
            print(f"copus: the workers cannot be asked for a checkpoint: {error.strerror}", file=sys.stderr)


def _wait_for_ticket(run: Path, name: str) -> None:
    """Wait until the run is said to belong to this job. Raises JobError where it does not come to that."""
    end = time.monotonic() + SECONDS
    while (ticket := read_ticket(run)) is None or ticket.job_id != name:
        if time.monotonic() > end:
            raise JobError(f"{run} does not belong to TrainJob {name} (engine.json): it is left alone")
        time.sleep(0.5)


def _stopped_by_user(run: Path) -> bool:
    try:
        return (run / "stop").read_text() != EVICTED
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
