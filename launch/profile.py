"""`copus profile run`: measure the throughput of a job's configurations and keep it."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from copus.event_log import EventLog
from copus.events import NOTHING_TO_SAY, End, Profile
from copus.job import JobConfig, JobError, load_job
from copus.profilers import TRIED, Installed, find_profiler
from copus.weights.source import with_tokenizer
from launch.attend import Outcome, attend
from launch.data import check, check_table, prepare
from launch.engines import Engine, LocalEngine, attended_engine_of
from launch.follow import Follower
from launch.interrupts import Interrupts
from launch.json_output import as_json_line
from launch.process import python_module
from launch.progress import SteadyConsole
from launch.run_directory import create_run, discard_run, lock_run, portable, write_job


class AloneEngine(LocalEngine):
    """One process on this machine, for a profiler that wants no ranks."""

    def command(self, run: Path, job: JobConfig, session: str, profile_only: bool) -> list[str]:
        """Without torch's agent: there is nobody to meet."""
        return python_module("copus.profiling.alone", run)


def profile(job_file: Path, overrides: list[str], engine_name: str | None = None, *, as_json: bool = False) -> int:
    """Start the workers only to fill the throughput table, with this engine if one is named. Prints where the table
    lies; returns the exit code."""
    job = portable(load_job(job_file, overrides, engine_name))
    job = with_tokenizer(job, notice=lambda line: print(f"copus: {line}", file=sys.stderr))
    if job.profile.when == "never":  # about training, and this command is no training
        job = job.model_copy(update={"profile": job.profile.model_copy(update={"when": "missing"})})
    console = SteadyConsole(stderr=True, highlight=False)
    alone = _profiler(job).processes == "one"
    if alone:
        check_table(job)
    else:
        engine = attended_engine_of(job, "copus profile")
        check(job)
        engine.ready(job)
    with Interrupts() as interrupts:
        run = create_run(job, suffix="-profile")
        with lock_run(run) as lock:
            if alone:
                profiled = profile_alone(run, job, lock, interrupts, console, partial(discard_run, run))
                assert profiled is not None, "it wants one process"
                outcome = profiled
            else:
                code, job = prepare(job, run / "job.yaml", interrupts)
                if code:
                    discard_run(run)
                    return code
                write_job(run, job)
                undo = partial(discard_run, run)
                outcome = attend(engine, run, job, lock, interrupts, console, profile_only=True, undo=undo)
    _note_end(run, outcome)
    done = [event for event in Follower(run).read() if isinstance(event, Profile)]  # of all attempts
    measured = sum(event.failure != NOTHING_TO_SAY for event in done)
    if as_json:
        result = {
            "table": str(job.profile.table),
            "run": str(run),
            "profiler": job.profile.profiler,
            "measured": measured,
            "exit_code": outcome.exit_code,
        }
        print(as_json_line(result))
    elif outcome.reason != "failed":
        unknown = f", {len(done) - measured} not known to the profiler" * (len(done) > measured)
        stopped = "" if outcome.exit_code == 0 else "; the same command goes on"
        nothing = "nothing was measured" if stopped else "nothing was missing"
        print(f"{measured} measured{unknown}" if done else nothing, f"in {job.profile.table}{stopped}")
    return outcome.exit_code


def _note_end(run: Path, outcome: Outcome) -> None:
    """Leave in the log how it ended: what measures alone does not say."""
    if outcome.reason == "failed":
        return
    log = EventLog(run)
    reason: Literal["finished", "interrupted"] = "finished" if outcome.exit_code == 0 else "interrupted"
    log.write(End(step=0, samples_consumed=0, reason=reason, seconds=outcome.seconds))
    log.close()


def profile_alone(
    run: Path, job: JobConfig, lock: int, interrupts: Interrupts, console: Console, undo: Callable[[], None]
) -> Outcome | None:
    """Run a job's profiler where it wants a process of its own; None if it runs in the job, or not at all.

    Where the process dies while it measures, another one goes on. Raises JobError, and calls `undo`, if the user has
    to mend something.
    """
    if job.profile.when == "never" or _profiler(job).processes == "all":
        return None
    died_at = ""
    while True:
        outcome = attend(AloneEngine(), run, job, lock, interrupts, console, profile_only=True, undo=undo)
        tried = run / TRIED
        trying = tried.read_text() if outcome.reason == "failed" and tried.exists() else ""
        if outcome.status.failure or trying in ("", died_at):  # or it died before it measured anything
            return outcome
        died_at = trying


def check_profiler(job: JobConfig, engine: Engine) -> None:
    """Raise JobError if a job that trains could not use what its profiler measures."""
    if job.profile.when == "never":
        return
    profiler = _profiler(job)
    if profiler.processes == "one" and not engine.is_here:
        raise JobError(
            f"profile.profiler({job.profile.profiler}) measures the machine where it is started, and launch.engine("
            f"{job.launch.engine}) trains on others: run `copus profile run` on one of those, then set profile.when: "
            "never; or set profile.profiler: live"
        )
    if not profiler.shards:
        return
    from planner.policies.policy import make_policy  # loads scipy, which no other profiler's job waits for here

    if not make_policy(job.planner).weighs_error:
        raise JobError(
            f"profile.profiler({job.profile.profiler}) measures shards without the network, and planner.policy("
            f"{job.planner.policy}) needs measured steps: set planner.policy: goodput, which weighs how sure the cost "
            "model is of the rest, or profile.profiler: live"
        )


def _profiler(job: JobConfig) -> Installed:
    """The job's profiler. Raises JobError if it cannot be imported."""
    profiler = find_profiler(job.profile.profiler)
    try:
        assert profiler.processes
    except ValueError as error:
        raise JobError(f"profile.profiler: {error}") from None
    return profiler
