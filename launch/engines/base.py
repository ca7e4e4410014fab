"""What every engine offers.

There are two kinds. An `AttendedEngine` starts workers that live below the launcher: it stands by them until they are
gone. A `QueuedEngine` hands the job to a scheduler and gets its id; the job then lives without the launcher, which only
reads the run directory and may leave.
"""

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from pydantic import ConfigDict

from copus.job import JobConfig, JobError
from launch.engines.log_files import lines_of
from launch.engines.ticket import Ticket, read_ticket
from launch.run_directory import lock_holder, request_stop, shown
from profiles.record import Record

Phase = Literal["queued", "running", "ended", "unknown"]

CPUS_PER_GPU = 8
"""A rank on a GPU runs more than its training thread: autograd's, NCCL's proxies, the reader's and the checkpoint's.
Nodes with eight GPUs have 12 cores or more for each."""


def usual_cpus_per_node(job: JobConfig, per_gpu: int | None = None) -> int:
    """CPUs to ask a scheduler for on each node: ranks × threads, on GPUs at least `per_gpu` for each rank
    (`CPUS_PER_GPU` where nobody knows)."""
    least = 1 if job.cluster.accelerator == "cpu" else per_gpu or CPUS_PER_GPU
    return job.cluster.accelerators_per_node * max(job.launch.threads_per_rank, least)


@dataclass(frozen=True)
class EngineState:
    """What an engine knows of a run."""

    phase: Phase
    """`queued` waits to be started, also between two attempts; `unknown` where the engine cannot be asked."""
    words: str
    """The same for people, with the engine's id and reason: `Slurm job 12 waits: Resources`."""


class EngineOptions(Record):
    """What an engine takes in `launch.options`. This one takes nothing; engines add their fields."""

    model_config = ConfigDict(strict=True)


class Workers(Protocol):
    """Workers that were started: a handle.

    What stops them with a checkpoint is the file `RUN/stop`, whatever the engine; the handle has only what differs.
    """

    logs: Path
    """Folder, or file, that their output goes to."""

    def poll(self) -> int | None:
        """Exit code of the whole job, or None while it runs. 0 only if every worker ended with 0."""

    def terminate(self) -> None:
        """Send SIGTERM to every worker: they stop at the next step, with a checkpoint, if they still can."""

    def kill(self) -> None:
        """End every worker at once, without a checkpoint, and wait until they are gone."""

    def failed_rank(self) -> int | None:
        """Rank whose failure came first, where the engine can tell."""

    def error_log(self, rank: int) -> Path | None:
        """File with what a rank wrote to stderr in its last attempt, if there is one."""


class Engine(ABC):
    """Where the workers of a job run. One object a command, made from the job's `launch.options`."""

    Options: ClassVar[type[EngineOptions]] = EngineOptions
    """What it takes in `launch.options`; the job file is refused where they do not validate."""
    options: EngineOptions
    own_software: ClassVar[bool] = False
    """Whether workers run another installation than this command's, an image say: nothing here tells what it has."""
    between: ClassVar[str] = ""
    """What separates the descriptions of several jobs."""
    is_here: ClassVar[bool] = False
    """Whether workers run on the machine of this command."""
    ask_seconds: ClassVar[float] = 0.0
    """Least time between two questions of `logs` whether a run is alive."""

    def __init__(self, options: EngineOptions | None = None) -> None:
        self.options = options or self.Options()

    @abstractmethod
    def check(self, job: JobConfig) -> None:
        """Raise JobError if this engine cannot run the job. Leaves nothing behind, and starts nothing."""

    def ready(self, job: JobConfig) -> None:  # noqa: B027 (most have nothing to ask)
        """Raise JobError if nothing can be started from this machine. Asked before data is prepared for hours."""

    def ready_again(self, job: JobConfig) -> list[str]:
        """`ready` for a run that goes on. Returns a line for everything missing that the run can do without."""
        self.ready(job)
        return []

    @abstractmethod
    def describe(self, run: Path, job: JobConfig) -> str:
        """What would be done, exactly, as text that the engine's own tools take: a script, a manifest, a command line.

        `run` need not exist. Nothing of the user's environment is in it but what COPUS sets.
        """

    @abstractmethod
    def state(self, run: Path) -> EngineState:
        """What became of the run. Answers within seconds; JobError where the engine cannot be asked."""

    @abstractmethod
    def cancel(self, run: Path, *, now: bool) -> str:
        """Stop the run for good, with a checkpoint, or at once where `now`. What was done, in words.

        Does not wait for the end. Raises JobError if nothing of the run is queued or running.
        """

    def log_files(self, run: Path) -> list[Path]:
        """What the agents and workers of the last submission printed; their number may grow."""
        return sorted((run / "logs").glob("*.log"))

    def logs(self, run: Path, rank: int | None, *, follow: bool) -> Iterator[str]:
        """Lines of the last submission's logs, of one rank where one is named; with `follow` until the run has ended.

        Lines of a rank begin with `[rankN]:` (the agents see to that).
        """
        return lines_of(lambda: self.log_files(run), rank, self._aliveness(run) if follow else None)

    def _aliveness(self, run: Path) -> Callable[[], bool]:
        """Whether a run is alive, for somebody who asks all the time. One that cannot be asked after is."""
        next_question, alive = -math.inf, True

        def ask() -> bool:
            nonlocal next_question, alive
            if time.monotonic() >= next_question:
                try:
                    alive = self.state(run).phase != "ended"
                except (JobError, OSError):
                    alive = True
                next_question = time.monotonic() + self.ask_seconds
            return alive

        return ask


class AttendedEngine(Engine):
    """Starts workers below the launcher, which follows them and stops them."""

    is_here = True

    @abstractmethod
    def start(self, run: Path, job: JobConfig, lock: int, *, profile_only: bool = False) -> Workers:
        """Start `copus.worker RUN` on every accelerator of the job; in a run that has a checkpoint they resume.

        `lock` is the descriptor of the run's lock: what keeps the workers alive keeps it open too, so that a run stays
        locked when its launcher dies first. They have the attempt's token (`copus.fencing`) in their environment; those
        of earlier ones, which may be left on another machine, write no more. `profile_only` makes the workers fill the
        throughput table and end.
        """

    @abstractmethod
    def end_workers(self, run: Path) -> bool:
        """End the workers of a run at once, whoever started them; whether there were any."""

    def state(self, run: Path) -> EngineState:
        """Running as long as somebody holds the run's lock."""
        holder = lock_holder(run)
        if holder is None:
            return EngineState("ended", "no workers are running")
        return EngineState("running", f"its workers are running (launched by {holder})")

    def cancel(self, run: Path, *, now: bool) -> str:
        """Make RUN/stop, which a launcher that still gets ready minds too; with `now` end the workers."""
        if lock_holder(run) is None:
            raise JobError(f"{shown(run)}: nothing to cancel: no workers are running")
        request_stop(run)
        if not now:
            return "its workers stop at the next step, with a checkpoint"
        if not self.end_workers(run):
            return "it has no workers yet, and starts none"
        return "its workers were ended; a resume goes on from the newest checkpoint"


class QueuedEngine(Engine):
    """Hands jobs to a scheduler.

    The launcher holds the run's lock while it calls `submit`, writes what that returns to RUN/engine.json,
    and only then lets go of the lock: a job that is started at once waits for it, and goes on only where the file
    names it.
    """

    ask_seconds = 10.0
    job_noun: ClassVar[str]
    """What a job of this scheduler is called for people, before its id: `Slurm job`."""

    @abstractmethod
    def submit(self, run: Path, job: JobConfig) -> Ticket:
        """Queue the job; where the run has checkpoints, its workers go on from the newest that verifies.

        Raises JobError, with the scheduler's own words in one line, if that is refused.
        """

    def array_key(self, job: JobConfig) -> str | None:
        """What jobs have to agree in for `submit_array`; None if this scheduler has no such thing."""
        return None

    def describe_array(self, runs: Sequence[Path], job: JobConfig, name: str, at_once: int | None) -> str:
        """`describe` of runs that `submit_array` queues."""
        raise NotImplementedError

    def submit_array(self, runs: Sequence[Path], job: JobConfig, name: str, at_once: int | None) -> list[Ticket]:
        """Queue runs whose jobs have the `array_key` of `job`, as one of this `name`, of which at most so many run
        `at_once`. Raises JobError as `submit` does."""
        raise NotImplementedError

    @abstractmethod
    def job_state(self, ticket: Ticket) -> EngineState:
        """What the scheduler says of a job; JobError where it cannot be asked."""

    @abstractmethod
    def withdraw(self, ticket: Ticket) -> str:
        """Take a job away from the scheduler at once. What became of it, as a verb: `was cancelled`."""

    def state(self, run: Path) -> EngineState:
        """What the scheduler says of the run's job."""
        ticket = read_ticket(run)
        return EngineState("ended", "it was never queued") if ticket is None else self.job_state(ticket)

    def cancel(self, run: Path, *, now: bool) -> str:
        """RUN/stop for workers that run; a job that waits, or `now`, is taken away from the scheduler.

        Raises OSError if the file cannot be written and the workers had to read it.
        """
        ticket, state = read_ticket(run), self.state(run)
        if ticket is None or state.phase == "ended":
            raise JobError(f"{shown(run)}: nothing to cancel: {state.words}")
        if state.phase == "running" and not now:
            request_stop(run)
            return f"the workers of {self.name_of(ticket)} stop at the next step, with a checkpoint"
        with contextlib.suppress(OSError):  # the scheduler ends the job too where nobody can write
            request_stop(run)
        return f"{self.name_of(ticket)} {self.withdraw(ticket)}"

    def name_of(self, ticket: Ticket) -> str:
        """A job in words."""
        return f"{self.job_noun} {ticket.job_id}"

    def error_log(self, run: Path) -> Path | None:
        """File to show the end of where the job failed and no worker said why."""
        return next(reversed(self.log_files(run)), None)
