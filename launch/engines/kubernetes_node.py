"""One pod of a TrainJob: `python -m launch.engines.kubernetes_node RUN`.

Runs torch's elastic agent with what the torch runtime of Kubeflow Trainer puts into the environment (PET_…), and ends
with 0 only if another start is of no use: the run was trained to the end, the user stopped it (`RUN/stop`), or the user
has to fix something (the run's events say which). Anything else, also a pod that is evicted, ends with `AGAIN` on all
nodes: Kubernetes starts them again, without counting, and the workers go on from the newest checkpoint.

The first node begins the attempt; its ranks tell those of the other nodes. It counts, too: if start after start
leads to no new checkpoint (`max_requeues`), it ends with `HOPELESS`.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from copus.event_log import EventLog
from copus.events import REQUEUED
from copus.fencing import TOKEN, replace_others
from copus.job import JobConfig, JobError, load_job
from copus.user_errors import report_failure
from launch.engines.agent import agent_arguments
from launch.engines.kubernetes_options import KubernetesOptions
from launch.engines.node_agent import agent_command, pause_on_sigterm, start_agent
from launch.engines.requeues import AGAIN, HOPELESS, count_attempt, next_attempt
from launch.engines.this_machine import check_interfaces
from launch.engines.ticket import read_ticket
from launch.follow import Follower
from launch.process import module_environment
from launch.run_directory import lock_run, request_pause
from launch.status import RunStatus

EVICTED = "evicted\n"
"""What is in RUN/stop where the run goes on later; the user's stop has nothing in it."""
SECONDS = 120.0
"""How long to wait for the launcher, which has the run's lock until it has written the job's name down."""


def main(arguments: list[str]) -> int:
    """One attempt on this node. Returns the exit code of the container."""
    early = EarlyEviction()
    run, name = Path(arguments[0]), os.environ["COPUS_JOB"]
    rank = int(os.environ.get("PET_NODE_RANK", 0))
    try:
        job = load_job(run / "job.yaml")
        _wait_for_ticket(run, name)
        if rank:
            return Node(run, job, name, rank).run()
        with lock_run(run, f"TrainJob {name}", SECONDS):
            early.is_counted = True
            if _is_hopeless(run, job, name):
                return HOPELESS
            if not _stopped_by_user(run):
                (run / "stop").unlink(missing_ok=True)
            session = f"{name}-{secrets.token_hex(4)}"
            replace_others(run, session)
            node = Node(run, job, name, rank, session)
            if early.came:
                request_pause(run, EVICTED)
            return node.run()
    except JobError as error:
        print(f"copus: {error}", file=sys.stderr)
        return 2


class EarlyEviction:
    """A SIGTERM before there are workers to be asked for a checkpoint, which the first process of a container would not
    notice: this process ends, to be started again. Once the start is counted it is only noted."""

    def __init__(self) -> None:
        """Takes SIGTERM over."""
        self.is_counted = self.came = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.came = True
        if not self.is_counted:
            sys.exit(AGAIN)


class Node:
    """The agent of one node, from its start to what follows from its end."""

    def __init__(self, run: Path, job: JobConfig, name: str, rank: int, session: str | None = None) -> None:
        """Takes SIGTERM over: an evicted pod asks for a checkpoint. `session` is the attempt's token, on the first
        node."""
        self._run, self._job, self._name, self._rank, self._session = run, job, name, rank, session
        self._log = run / "logs" / f"{name}.node-{rank}.log"
        self._agent: subprocess.Popen[bytes] | None = None
        self._had_workers = False
        pause_on_sigterm(run, EVICTED, self._leave_early)

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
        agent = start_agent(self.command(), self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._agent = agent
        assert agent.stdout is not None
        with open(self._log, "ab", buffering=0) as log:
            for line in agent.stdout:
                self._had_workers = self._had_workers or line.startswith(b"[rank")
                log.write(line)
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
        pause_on_sigterm(self._run, EVICTED)  # what is without workers now has had them
        code = agent.wait()
        status.update(follower.read())
        over = code == 0 and status.end is not None and status.end.reason != "interrupted"
        over = over or (status.failure is not None and status.failure.user_error)
        return 0 if over or (code == 0 and _stopped_by_user(self._run)) else AGAIN

    def _leave_early(self) -> None:
        """End at once, to be started again, while there were no workers. The first node may not have begun yet: it
        would take a request for a checkpoint for one to the attempt before. After the last step there are none either,
        and nobody is left whom a new agent could meet."""
        if not self._rank or self._had_workers:
            return
        if self._agent is None or not psutil.Process(self._agent.pid).children():
            sys.exit(AGAIN)

    def command(self) -> list[str]:
        """The agent's command line, from what the runtime has put into the environment."""
        logs = self._run / "logs" / f"{self._name}.node-{self._rank}"
        common: dict[str, Any] = {"session": self._name, "logs": logs}
        if self._job.cluster.nodes == 1:  # then nothing has to be reached from elsewhere
            here = "127.0.0.1"
            place: dict[str, Any] = {"backend": "bound", "endpoint": f"{here}:0", "address": here}
            return agent_command(*agent_arguments(self._run, self._job, **common, **place))
        endpoint = f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}"
        place = {"endpoint": endpoint, "address": os.environ["POD_IP"]}
        # An agent that is alone again gives up after this long, and its pod is started anew with the others.
        settings = f"is_host={int(self._rank == 0)},join_timeout={self._job.launch.timeout_seconds:.0f}"
        arguments = agent_arguments(self._run, self._job, **common, **place)
        return agent_command("--rdzv-conf", settings, *arguments)

    def environment(self) -> dict[str, str]:
        """The agent's. A log of this job means that Kubernetes has started the pod before."""
        interfaces = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
        requeued = {REQUEUED: "1"} if self._log.exists() else {}
        alone = interfaces if self._job.cluster.nodes == 1 else {}
        session = {TOKEN: self._session} if self._session else {}
        return alone | os.environ | module_environment() | requeued | session


def _is_hopeless(run: Path, job: JobConfig, name: str) -> bool:
    """Count this start. Whether too many in a row led to no new checkpoint; the run's events say so then."""
    options = KubernetesOptions.model_validate(job.launch.options)
    status = RunStatus()
    status.update(Follower(run).read())
    samples = status.checkpoint.samples_consumed if status.checkpoint else 0
    evicted = (run / "stop").exists() and not _stopped_by_user(run)
    counted = count_attempt(run, name, next_attempt(run, name, evicted=evicted), samples)
    if counted.fruitless <= options.max_requeues or _stopped_by_user(run):
        return False
    failure = JobError(
        f"TrainJob {name} fails: {options.max_requeues} starts again without a new checkpoint "
        f"(launch.options.max_requeues; starts in all: {counted.attempt + 1})"
    )
    report_failure(failure, EventLog(run), rank=0)
    return True


def _wait_for_ticket(run: Path, name: str) -> None:
    """Wait until the run is said to belong to this job. Raises JobError if it does not come to that."""
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
