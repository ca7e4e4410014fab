"""A job in a scheduler's queue: handing it over, and following it from outside."""

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from copus.job import JobConfig, JobError
from launch.attend import POLL_SECONDS, Outcome, last_lines, show_new
from launch.engines import EngineState, QueuedEngine, engine_state
from launch.engines.ticket import write_ticket
from launch.follow import Follower
from launch.interrupts import Interrupts
from launch.progress import Progress
from launch.run_directory import lock_run, stopped_for_good, typed
from launch.status import RunStatus

STATE_SECONDS = 3.0
"""Time between two questions to the scheduler."""
LOOKS = 2
"""Times in a row that a scheduler has to say that a job has ended: what was written last may come late."""


@dataclass(frozen=True)
class Queued:
    """A job that was handed over, seen from when that was."""

    follower: Follower
    """Has read what earlier attempts wrote."""
    status: RunStatus
    """What that amounts to, without how they ended."""


def hand_over(engine: QueuedEngine, run: Path, job: JobConfig) -> Queued:
    """Queue a job and note which it is in RUN/engine.json. Hold the run's lock. Raises JobError if it is refused."""
    queued = hold(engine, run, job)
    write_ticket(run, engine.submit(run, job))
    return queued


def hold(engine: QueuedEngine, run: Path, job: JobConfig) -> Queued:
    """Queue nothing yet: in place of `hand_over` for a run that is queued with others (`hand_over_array`)."""
    queued = Queued(Follower(run), RunStatus())
    queued.status.update(queued.follower.read())
    queued.status.forget_ending()
    return queued


def hand_over_array(engine: QueuedEngine, runs: Sequence[Path], job: JobConfig, name: str, at_once: int | None) -> None:
    """Queue runs with the same needs as one job of the scheduler, as `hand_over` does with one."""
    with ExitStack() as locks:
        for run in runs:
            locks.enter_context(lock_run(run))
        for run, ticket in zip(runs, engine.submit_array(runs, job, name, at_once), strict=True):
            write_ticket(run, ticket)


def follow_job(engine: QueuedEngine, run: Path, queued: Queued, interrupts: Interrupts, console: Console) -> Outcome:
    """Show a queued job until it has ended, or until an interrupt: that ends this command, and never the job.

    Raises JobError if a worker met an error that the user has to fix.
    """
    follower, status = queued.follower, queued.status
    state, next_question, ended = EngineState("unknown", ""), 0.0, 0
    last_start = status.start
    with Progress(console, run, status) as progress:
        while ended < LOOKS and not interrupts.count:
            if time.monotonic() >= next_question:
                state, before = engine_state(run), state
                next_question = time.monotonic() + STATE_SECONDS
                ended = ended + 1 if state.phase == "ended" else 0
                progress.waiting = state.words
                if state.phase == "queued":
                    progress.held, last_start = True, status.start
                    status.forget_ending()  # that of an attempt, not of the job
                if state.words != before.words:
                    progress.say(state.words)
            show_new(follower, status, progress)
            progress.held = progress.held and status.start is last_start  # until the workers are up again
            time.sleep(POLL_SECONDS)
        show_new(follower, status, progress)
        seconds = progress.elapsed_seconds
    if ended < LOOKS:
        return Outcome(128 + (interrupts.signal or signal.SIGINT), "queued", status, seconds)
    if status.end is None and status.failure is None and stopped_for_good(run):
        return Outcome(128 + signal.SIGTERM, "killed", status, seconds)
    if status.failure and status.failure.user_error:
        raise JobError(status.failure.message)
    if status.end is None:
        _explain_failure(engine, run, state, status)
        return Outcome(1, "failed", status, seconds)
    codes = {"interrupted": 128 + signal.SIGTERM, "diverged": 1}
    return Outcome(codes.get(status.end.reason, 0), status.end.reason, status, seconds)


def _explain_failure(engine: QueuedEngine, run: Path, state: EngineState, status: RunStatus) -> None:
    """One line that says what went wrong, then where to read more, on stderr."""
    what, log = f"{state.words}, and no worker said why", engine.error_log(run)
    if status.failure:
        what, log = f"rank {status.failure.rank} failed: {status.failure.message}", None
    print("\n".join([f"copus: {what}", f"  logs: copus logs {typed(run)}", *last_lines(log)]), file=sys.stderr)
