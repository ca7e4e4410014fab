"""`copus submit`: from a job file, or from an interrupted run, to a trained model."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from copus.audit import audit_run
from copus.checkpoints.files import FOLDER, check_same_data, checkpoint_names
from copus.events import has_checkpoint
from copus.job import JobConfig, JobError, load_job
from copus.resize import load_resized
from copus.resume_request import ResumeRequest, write_resume_request
from copus.weights.source import with_tokenizer
from launch.attend import Outcome, attend
from launch.audit import audit_lines
from launch.check import check_start
from launch.data import check, check_named_data, keep_data, prepare
from launch.engines import AttendedEngine, Engine, QueuedEngine, check_not_queued, engine_of, engine_state
from launch.engines.ticket import clear_ticket
from launch.follow import Follower
from launch.interrupts import Interrupts
from launch.json_output import as_json_line
from launch.profile import check_profiler, profile_alone
from launch.progress import SteadyConsole
from launch.queued import Queued, follow_job, hand_over
from launch.resume import check_settings, request_of, settled
from launch.run_directory import (
    clear_stop,
    create_run,
    discard_run,
    find_run,
    lock_run,
    next_run,
    portable,
    shown,
    typed,
    write_job,
)
from launch.status import RunStatus
from launch.tracking import check_trackers
from launch.weights import check_weights, keep_weights
from launch.wording import LIMITS, describe_limit
from profiles.formatting import count, duration, percent


@dataclass(frozen=True)
class Manner:
    """How a job is submitted."""

    engine: str | None = None
    """Instead of the job's `launch.engine`."""
    dry_run: bool = False
    """Only say what would be done."""
    may_begin_again: bool = False
    """Whether a resumed run may begin at its first step if no checkpoint verifies."""
    detach: bool = False
    """Leave a queued job alone as soon as it is queued."""
    as_json: bool = False
    """The result as JSON on stdout."""


def submit(job_file: Path | None, overrides: list[str], resume: str | None, manner: Manner) -> int:
    """Train, or go on training. Returns the exit code; raises JobError, and leaves nothing, where the user errs."""
    console = SteadyConsole(stderr=manner.as_json, highlight=False)
    if resume is not None:
        return _resume(find_run(resume), job_file, overrides, console, manner)
    if manner.may_begin_again:
        raise JobError("--allow-from-scratch: only with --resume")
    if job_file is None:
        raise JobError("nothing to train: give a job file, or --resume RUN")

    def notice(line: str) -> None:
        print(f"copus: {line}", file=sys.stderr)

    job = portable(load_job(job_file, overrides, manner.engine, notice=lambda line: print(line, file=sys.stderr)))
    job = with_tokenizer(job, notice)
    training = job.training.model_copy(update={"reference_batch": job.reference_batch})  # whatever a resume changes
    job = job.model_copy(update={"training": training})
    engine = engine_of(job)
    _check_manner(engine, job, manner)
    check_named_data(job, overrides)
    check(job)
    check_profiler(job, engine)
    if not engine.own_software:
        check_trackers(job)
    check_start(job)
    job, weights = check_weights(job, notice)
    if manner.dry_run:
        return _describe(engine, next_run(job), job, manner)
    if isinstance(engine, QueuedEngine):
        engine.ready()
    with Interrupts() as interrupts:
        run = create_run(job)
        with lock_run(run) as lock:
            code, job = prepare(job, run / "job.yaml", interrupts)
            code = code or keep_weights(run, job, weights)
            if code:
                discard_run(run)
                return code
            write_job(run, job)  # from here on the run names its data
            outcome = _measure_and_launch(engine, run, job, lock, interrupts, console, partial(discard_run, run))
        if isinstance(outcome, Queued):
            outcome = _follow(engine, run, outcome, interrupts, console, manner)
    return _conclude(outcome, run, job, console, manner)


def _check_manner(engine: Engine, job: JobConfig, manner: Manner) -> None:
    """Raise JobError for what the engine cannot do."""
    if manner.detach and not isinstance(engine, QueuedEngine):
        raise JobError(
            f"--detach: launch.engine({job.launch.engine}) has no queue: this command stays with the workers until "
            "they end"
        )


def _resume(run: Path, job_file: Path | None, overrides: list[str], console: Console, manner: Manner) -> int:
    before = load_job(run / "job.yaml")
    job = portable(load_resized(job_file or run / "job.yaml", overrides, manner.engine))
    job = settled(job, before)
    status = RunStatus()
    status.update(Follower(run).read())
    job = keep_data(run, portable(before), job, status)
    check_settings(run, portable(before), job, overrides)
    for checkpoint in checkpoint_names(run):
        check_same_data(run / FOLDER / checkpoint, job.data.prepared)
    finished = status.end is not None and status.end.reason == "finished"
    if finished and status.start is not None and job.total_samples <= status.start.total_samples:
        return _conclude(Outcome(0, "finished", status, 0.0), run, job, console, manner, already=True)
    if job.training.backend != before.training.backend:
        console.print(f"goes on with the {job.training.backend} backend, not {before.training.backend}", markup=False)
    request = request_of(
        run,
        portable(before),
        job,
        overrides,
        from_file=job_file is not None,
        may_begin_again=manner.may_begin_again,
    )
    engine = engine_of(job)
    _check_manner(engine, job, manner)
    check(job)
    check_profiler(job, engine)
    if not engine.own_software:
        check_trackers(job)
    if manner.dry_run:
        return _describe(engine, run, job, manner)
    if isinstance(engine, QueuedEngine):
        engine.ready()
    with Interrupts() as interrupts:
        with lock_run(run) as lock:
            check_not_queued(run)
            clear_stop(run)
            if job != before:
                write_job(run, job)
            write_resume_request(run, request)

            def undo() -> None:
                write_job(run, before)
                write_resume_request(run, ResumeRequest())

            code, job = prepare(job, run / "job.yaml", interrupts)
            if code:
                undo()
                return code
            if job != before:
                write_job(run, job)
            outcome = _measure_and_launch(engine, run, job, lock, interrupts, console, undo)
        if isinstance(outcome, Queued):
            outcome = _follow(engine, run, outcome, interrupts, console, manner)
    return _conclude(outcome, run, job, console, manner)


def _measure_and_launch(
    engine: Engine,
    run: Path,
    job: JobConfig,
    lock: int,
    interrupts: Interrupts,
    console: Console,
    undo: Callable[[], None],
) -> Outcome | Queued:
    """`_launch`, after a profiler that wants a process of its own has run, unless that did not end well."""
    measured = profile_alone(run, job, lock, interrupts, console, undo)
    if measured and measured.exit_code:
        return measured
    return _launch(engine, run, job, lock, interrupts, console, undo)


def _launch(
    engine: Engine,
    run: Path,
    job: JobConfig,
    lock: int,
    interrupts: Interrupts,
    console: Console,
    undo: Callable[[], None],
) -> Outcome | Queued:
    """Run the job to its end, or hand it to a scheduler. `undo` is called if nothing came of either."""
    if isinstance(engine, QueuedEngine):
        try:
            return hand_over(engine, run, job)
        except JobError:
            undo()
            raise
    assert isinstance(engine, AttendedEngine), "there are two kinds"
    clear_ticket(run)
    return attend(engine, run, job, lock, interrupts, console, undo=undo)


def _follow(
    engine: Engine, run: Path, queued: Queued, interrupts: Interrupts, console: Console, manner: Manner
) -> Outcome:
    """What becomes of a job that was handed over; only that it was, where nobody stays to see it."""
    assert isinstance(engine, QueuedEngine), "others are attended to the end"
    if manner.detach:
        return Outcome(0, "queued", queued.status, 0.0)
    return follow_job(engine, run, queued, interrupts, console)


def _describe(engine: Engine, run: Path, job: JobConfig, manner: Manner) -> int:
    """Print what would be done, so that the engine's own tools can read it."""
    text = engine.describe(run, job)
    print(as_json_line({"engine": job.launch.engine, "run": str(run), "description": text}) if manner.as_json else text)
    return 0


def _conclude(
    outcome: Outcome, run: Path, job: JobConfig, console: Console, manner: Manner, *, already: bool = False
) -> int:
    """Say how it ended, where the run lies, and what looks at it."""
    status, place = outcome.status, typed(run)
    resume = f"copus submit --resume {place}"
    tokens = status.samples_consumed * status.start.seq_len if status.start else 0
    audited = audit_run(run) if outcome.reason != "queued" and status.step else None
    if manner.as_json:
        result = {
            "run": str(run),
            "reason": outcome.reason,
            "exit_code": outcome.exit_code,
            "samples_consumed": status.samples_consumed,
            "tokens": tokens,
            "loss": status.step.loss if status.step else None,
            "validation_loss": status.evaluation.loss if status.evaluation else None,
            "seconds": outcome.seconds,
            "audit": audited.model_dump(mode="json") if audited else None,
        }
        print(as_json_line(result))
        return outcome.exit_code
    if outcome.reason == "queued":
        console.print(_left_alone(run), markup=False, soft_wrap=True)
        return outcome.exit_code
    headline = {
        "finished": f"{shown(run)} finished already" if already else f"finished in {duration(outcome.seconds)}",
        **{limit: f"stopped: {describe_limit(limit, status.start)}" for limit in LIMITS},
        "diverged": "ended, it diverged",
        "interrupted": "stopped",
        "killed": "ended at once",
        "failed": "the run failed",
    }[outcome.reason]
    lines = [f"{headline}: {count(tokens)} tokens{_losses(status)}"]
    if status.skipped_steps:
        lines.append(f"  skipped     {status.skipped_steps} of {status.steps} steps: their gradients were not finite")
    if outcome.reason != "finished":
        newest = next(iter(checkpoint_names(run)), None)
        where = f"from {FOLDER}/{newest}" if newest else "from the start: there is no checkpoint"
        again = " --set training.lr=…" if outcome.reason == "diverged" else ""
        again += " --allow-from-scratch" if newest is None and has_checkpoint(run) else ""
        lines.append(f"  resume      {resume}{again}   ({where})")
    lines += [
        f"  run         {shown(run)}",
        f"  report      copus report {place}",
        f"  decisions   copus explain {place}",
    ]
    if "tensorboard" in job.tracking:
        lines.append(f"  curves      tensorboard --logdir {place}/tensorboard")
    if shutil.which("copus") is None:  # in an environment that is not activated
        lines.append(f"  copus       is {shown(Path(sys.argv[0]).absolute())}")
    if audited is not None:
        lines += audit_lines(audited)
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    return outcome.exit_code


def _left_alone(run: Path) -> str:
    """Where to look at a job that goes on without this command."""
    place = typed(run)
    lines = [
        f"{engine_state(run).words}; it keeps running without this command",
        f"  run         {shown(run)}",
        f"  watch       copus watch {place}",
        f"  logs        copus logs {place} --follow",
        f"  stop        copus cancel {place}",
    ]
    return "\n".join(lines)


def _losses(status: RunStatus) -> str:
    text = f", loss {status.step.loss:.3f}" if status.step and status.step.loss is not None else ""
    first, last = status.first_evaluation, status.evaluation
    if last and last.loss is not None:
        text += f", validation loss {last.loss:.3f}"
        if status.start and last.samples_consumed < status.samples_consumed:
            text += f" at {count(last.samples_consumed * status.start.seq_len)}"
        if first and first is not last and first.loss:
            text += f" ({percent(last.loss / first.loss)} of the first one, {first.loss:.3f})"
    return text
