"""A job in a scheduler's queue: handing it over, and following it from outside."""

import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from copus.job import JobConfig
from launch.attend import POLL_SECONDS, Outcome, last_lines, show_new
from launch.engines import EngineState, QueuedEngine, Ticket, engine_state
from launch.engines.ticket import write_ticket
from launch.follow import Follower
from launch.interrupts import Interrupts
from launch.progress import Progress
from launch.run_directory import clear_stop, shown
from launch.status import RunStatus

STATE_SECONDS = 3.0
"""Time between two questions to the scheduler."""
LOOKS = 2
"""Times in a row that a scheduler has to say that a job has ended: what was written last may come late."""


def hand_over(engine: QueuedEngine, run: Path, job: JobConfig, *, resume: bool) -> Ticket:
    """Queue a job and note which it is in RUN/engine.json. Hold the run's lock. Raises JobError where it is refused."""
    clear_stop(run)
    ticket = engine.resume(run, job) if resume else engine.submit(run, job)
    write_ticket(run, ticket)
    return ticket


def follow_job(engine: QueuedEngine, run: Path, interrupts: Interrupts, console: Console) -> Outcome:
    """Show a queued job until it has ended, or until an interrupt: that ends this command, and never the job."""
    follower, status = Follower(run), RunStatus()
    status.update(follower.read())
    status.forget_ending()
    state, next_question, ended = EngineState("unknown", ""), 0.0, 0
    with Progress(console, run, status) as progress:
        while ended < LOOKS and not interrupts.count:
            if time.monotonic() >= next_question:
                state, before = engine_state(run), state
                next_question = time.monotonic() + STATE_SECONDS
                ended = ended + 1 if state.phase == "ended" else 0
                progress.waiting = state.words
                if state.words != before.words:
                    progress.say(state.words)
            show_new(follower, status, progress)
            time.sleep(POLL_SECONDS)
        show_new(follower, status, progress)
        seconds = progress.elapsed_seconds
    if ended < LOOKS:
        return Outcome(128 + (interrupts.signal or signal.SIGINT), "queued", status, seconds)
    if status.end is None:
        _explain_failure(engine, run, state, status)
        return Outcome(1, "failed", status, seconds)
    code = 128 + signal.SIGTERM if status.end.reason == "interrupted" else 0
    return Outcome(code, status.end.reason, status, seconds)


def detached(run: Path) -> Outcome:
    """The outcome of a job that was queued and is not followed."""
    status = RunStatus()
    status.update(Follower(run).read())
    return Outcome(0, "queued", status, 0.0)


def _explain_failure(engine: QueuedEngine, run: Path, state: EngineState, status: RunStatus) -> None:
    """One line that says what went wrong, then where to read more, on stderr."""
    what, log = f"{state.words}, and no worker said why", engine.error_log(run)
    if status.failure:
        what, log = f"rank {status.failure.rank} failed: {status.failure.message}", None
    print("\n".join([f"copus: {what}", f"  logs: copus logs {shown(run)}", *last_lines(log)]), file=sys.stderr)
