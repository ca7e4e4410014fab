"""Standing by the workers of a run until they are gone: progress, interrupts, and what to say at the end."""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from copus.durable import full_disk
from copus.job import JobConfig, JobError
from launch.engines import AttendedEngine, Workers
from launch.follow import Follower
from launch.interrupts import Interrupts
from launch.progress import Progress
from launch.run_directory import request_stop, shown, stop_requested
from launch.status import RunStatus

POLL_SECONDS = 0.2
"""Time between two looks at the workers and their events."""
LAST_LINES = 15
"""Lines of a failing rank's stderr that are shown."""


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    exit_code: int
    """0, 1 if workers failed or the run diverged, 128 + signal if they were stopped."""
    reason: str
    """finished, max_minutes, target_loss, diverged, interrupted, killed, failed; queued if the job goes on without this
    command."""
    status: RunStatus
    """The run's last state."""
    seconds: float
    """How long it took."""


def attend(
    engine: AttendedEngine,
    run: Path,
    job: JobConfig,
    lock: int,
    interrupts: Interrupts,
    console: Console,
    *,
    profile_only: bool = False,
    undo: Callable[[], None] = lambda: None,
) -> Outcome:
    """Start the workers and wait until they have ended. One interrupt stops them with a checkpoint, a second kills.

    Starts none if the run was asked to stop while it got ready. Raises JobError if a worker met an error that the user
    has to fix, and calls `undo` first if nothing was measured or trained before.
    """
    follower, status = Follower(run), RunStatus()
    status.update(follower.read())
    status.forget_ending()
    start_before = status.start
    if stop_requested(run):
        return Outcome(128 + signal.SIGTERM, "interrupted", status, 0.0)
    workers = engine.start(run, job, lock, profile_only=profile_only)
    heard = 0
    try:
        with Progress(console, run, status) as progress:
            while (code := workers.poll()) is None:
                if interrupts.count > heard:
                    heard = _interrupt(interrupts, heard, run, workers, progress, profile_only)
                show_new(follower, status, progress)
                time.sleep(POLL_SECONDS)
            show_new(follower, status, progress)
            seconds = progress.elapsed_seconds
    finally:
        if workers.poll() is None:  # this command itself failed: do not leave them behind
            workers.terminate()
    if heard > 1 or (code < 0 and status.failure is None and stop_requested(run)):  # here, or by `copus cancel --now`
        return Outcome(128 + (interrupts.signal or signal.SIGTERM), "killed", status, seconds)
    ended = status.end is not None or profile_only or heard > 0
    message = status.failure.message if status.failure and status.failure.user_error else None
    if status.failure is None and (code or not ended) and (full := full_disk(run)):
        message = f"{full}: what the workers did last is not there; make room, then resume"
    if message:
        if status.start is start_before and status.profile is None:
            undo()
        raise JobError(message)
    if code or not ended:
        _explain_failure(code, workers, status)
        return Outcome(1, "failed", status, seconds)
    stopped = heard > 0 or stop_requested(run)
    reason = status.end.reason if status.end else "interrupted" if stopped else "finished"
    if reason == "interrupted":  # without a signal to this command: somebody else asked the workers to stop
        return Outcome(128 + (interrupts.signal or signal.SIGTERM), reason, status, seconds)
    return Outcome(1 if reason == "diverged" else 0, reason, status, seconds)


def show_new(follower: Follower, status: RunStatus, progress: Progress) -> None:
    """Take in and show what was written since the last look."""
    events = follower.read()
    status.update(events)
    progress.show(events)


def _interrupt(
    interrupts: Interrupts, heard: int, run: Path, workers: Workers, progress: Progress, profile_only: bool
) -> int:
    """Pass an interrupt on. Returns the number of interrupts dealt with."""
    if heard == 0:
        request_stop(run)
        how = "after this measurement" if profile_only else "at the next step, checkpointing"
        progress.say(f"stopping {how} (once more: end at once)")
        return 1
    kept = "what was measured is kept" if profile_only else "a resume will go on from the newest checkpoint"
    progress.say(f"ending the workers at once: {kept}")
    workers.kill()
    return max(2, interrupts.count)


def _explain_failure(code: int, workers: Workers, status: RunStatus) -> None:
    """One line that says what went wrong, then where to read more, on stderr."""
    rank = status.failure.rank if status.failure else workers.failed_rank()
    if status.failure:
        what = f"rank {rank} failed: {status.failure.message}"
    else:
        who = "the workers" if rank is None else f"rank {rank}"
        what = f"{who} ended without saying why (exit code {code})"
    log = workers.error_log(rank) if rank is not None else None
    print("\n".join([f"copus: {what}", f"  logs: {shown(workers.logs)}", *last_lines(log)]), file=sys.stderr)


def last_lines(log: Path | None) -> list[str]:
    """The end of a log with its heading, for a message; nothing if there is no log."""
    if log is None:
        return []
    last = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return [f"  last lines of {shown(log)}:", *(f"    {line}" for line in last)]
