"""The first node of a Slurm job: `python -m launch.engines.slurm_job RUN`, from the batch script.

Holds the run's lock, runs one elastic agent on each node by `srun`, and decides what follows when they are gone:

- trained to the end, or stopped by the user (`RUN/stop`): the job ends;
- stopped because the time limit is near (SIGUSR1) or Slurm wants the nodes (SIGTERM), or failed: back into the queue;
- requeued again and again without a new checkpoint in between (`max_requeues`): the job fails.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from copus.event_log import EventLog
from copus.events import Warned
from copus.fencing import replace_others
from copus.job import JobConfig, JobError, load_job
from copus.parent_death import die_with_parent
from copus.user_errors import EXIT_CODE
from launch.engines.requeues import REQUEUE, Requeues, count_attempt
from launch.engines.slurm_commands import node_addresses, queue_entry, slurm
from launch.engines.slurm_options import SlurmOptions
from launch.engines.slurm_step import endpoint_of, step_command, without_own_packages
from launch.engines.this_machine import own_address_towards
from launch.engines.ticket import read_ticket
from launch.follow import Follower
from launch.run_directory import lock_run, request_pause
from launch.status import RunStatus

LOCK_SECONDS = 120.0
"""How long to wait for the run: the launcher has it until it has written the job's id down, and an attempt that died
until its processes are gone."""
ENDING_SECONDS = 120.0
"""How long to wait for the end that was asked for."""
PATIENCE_SECONDS, RETRY_SECONDS = 60.0, 5.0
"""How long to ask Slurm again where it does not answer, and how often: a controller that is slow must not end a job."""
Answer = TypeVar("Answer")


def main(arguments: list[str]) -> int:
    """One attempt. Returns the exit code of the batch script."""
    run = Path(arguments[0])
    job_id, attempt = own_job_id(), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    here = os.environ["SLURMD_NODENAME"]
    try:
        job = load_job(run / "job.yaml")
        with lock_run(run, f"Slurm job {job_id} on {here}", LOCK_SECONDS):
            ticket = read_ticket(run)
            if ticket is None or ticket.job_id != job_id:
                raise JobError(f"{run} does not belong to Slurm job {job_id} (engine.json): it is left alone")
            return Attempt(run, job, job_id, attempt, here).run()
    except JobError as error:
        _say(str(error))
        return 1


def own_job_id() -> str:
    """As Slurm's programs take it: that of a task of an array has the task's index."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


class Attempt:
    """The workers of a job, from their start to the decision what follows."""

    def __init__(self, run: Path, job: JobConfig, job_id: str, attempt: int, here: str) -> None:
        """Takes SIGUSR1 and SIGTERM over. `here` is this node's name in Slurm."""
        self._run, self._job = run, job
        self._options = SlurmOptions.model_validate(job.launch.options)
        self._job_id, self._attempt, self._here = job_id, attempt, here
        self._session = f"{job_id}-{attempt}"
        self._stop = run / "stop"
        self._events, self._status = Follower(run), RunStatus()
        self._why: str | None = None
        signal.signal(signal.SIGUSR1, lambda number, frame: self._ask("its time limit is near"))
        signal.signal(signal.SIGTERM, lambda number, frame: self._ask("Slurm takes its nodes"))

    def run(self) -> int:
        """Run the workers and conclude."""
        self._new_status().forget_ending()  # that of an attempt before
        if self._stopped_by_user():
            _say("the run was stopped before this attempt began")
            return 0
        self._stop.unlink(missing_ok=True)
        counted = count_attempt(self._run, self._job_id, self._attempt, self._checkpoint_samples())
        if counted.fruitless > self._options.max_requeues:
            return self._give_up(counted)
        _say(f"attempt {self._attempt} of Slurm job {self._job_id}, on {os.environ.get('SLURM_JOB_NODELIST')}")
        replace_others(self._run, self._session)
        step = subprocess.Popen(
            self._srun(), env=without_own_packages(os.environ, self._options), preexec_fn=die_with_parent()
        )
        while step.poll() is None:
            time.sleep(0.2)
        return self._conclude(step.returncode, counted)

    def _srun(self) -> list[str]:
        """One agent on each node; when one fails all are ended."""
        nodes = self._job.cluster.nodes
        addresses, endpoint = {self._here: "127.0.0.1"}, "127.0.0.1:0"
        if nodes > 1:  # only then has anything to be reached from elsewhere
            resolved = _patiently(lambda: node_addresses(os.environ["SLURM_JOB_NODELIST"]))
            addresses = {self._here: resolved[self._here]} | resolved
            other = next(address for name, address in resolved.items() if name != self._here)
            own = own_address_towards(other) or addresses[self._here]
            endpoint = endpoint_of(self._options, os.environ["SLURM_JOB_ID"], own)
        return step_command(self._run, self._job, self._options, self._session, addresses, endpoint)

    def _ask(self, why: str) -> None:
        """Ask the workers for a checkpoint, on a signal. The user's request to stop for good stays."""
        self._why = self._why or why
        try:
            request_pause(self._run, REQUEUE)
        except OSError as error:  # a full disk, which would take no checkpoint either
            _say(f"the workers cannot be asked for a checkpoint: {error.strerror}")

    def _conclude(self, code: int, counted: Requeues) -> int:
        """What follows from the end of the workers."""
        status = self._new_status()
        if status.failure and status.failure.user_error:
            _say(f"no requeue: {status.failure.message}")
            return EXIT_CODE
        done = code == 0 and status.end is not None and status.end.reason != "interrupted"
        if done or self._stopped_by_user():
            return 1 if status.end is not None and status.end.reason == "diverged" else code
        why = self._why or (f"its workers failed (srun: {code})" if code else self._why_stopped())
        fruitless = 0 if self._checkpoint_samples() > counted.checkpoint_samples else counted.fruitless + 1
        if fruitless > self._options.max_requeues:
            return self._give_up(counted)
        entry = _patiently(lambda: queue_entry(self._job_id))
        if entry is None or entry.state != "RUNNING":  # cancelled, or preempted: Slurm decides, and has done so
            _say(f"Slurm ends this attempt ({entry.state if entry else 'gone'})")
            return code or 1
        limit = f", {fruitless} of {self._options.max_requeues} without a new checkpoint" if fruitless else ""
        self._tell(f"Slurm job {self._job_id} goes back into the queue: {why} (requeue {self._attempt + 1}{limit})")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # that is how Slurm ends this process
        _patiently(lambda: slurm("scontrol", "requeue", self._job_id))
        time.sleep(ENDING_SECONDS)
        return 1

    def _give_up(self, counted: Requeues) -> int:
        self._tell(
            f"Slurm job {self._job_id} fails: {self._options.max_requeues} requeues without a new checkpoint "
            f"(launch.options.max_requeues; attempts in all: {counted.attempt + 1})"
        )
        return 1

    def _why_stopped(self) -> str:
        """Why the workers stopped in order. Slurm preempts the nodes of a job without a word to its batch script."""
        return "Slurm takes its nodes" if self._stop.exists() else "its workers were stopped"

    def _stopped_by_user(self) -> bool:
        try:
            return self._stop.read_text() != REQUEUE
        except FileNotFoundError:
            return False

    def _new_status(self) -> RunStatus:
        """The run's status, with the events that were written since the last call."""
        self._status.update(self._events.read())
        return self._status

    def _checkpoint_samples(self) -> int:
        checkpoint = self._new_status().checkpoint
        return checkpoint.samples_consumed if checkpoint else 0

    def _tell(self, message: str) -> None:
        """Into the log of the job and into the run's events: the workers are gone, nobody else writes there."""
        _say(message)
        status = self._new_status()
        log = EventLog(self._run)
        log.write(
            Warned(
                step=status.step.step if status.step else 0, samples_consumed=status.samples_consumed, message=message
            )
        )
        log.close()


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """Slurm's answer, asked for until it comes. Raises the last JobError where it does not."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except JobError as error:
            if time.monotonic() > end:
                raise
            _say(f"{error}; asking again")
            time.sleep(RETRY_SECONDS)


def _say(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} copus: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
