"""`copus submit`: from a job file, or from an interrupted run, to a trained model."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from copus.checkpoints.files import FOLDER, check_same_data, checkpoint_names
from copus.job import JobConfig, JobError, load_job
from copus.resize import load_resized
from copus.resume_request import ResumeRequest, write_resume_request
from copus.trackers import check_installed
from copus.weights.source import Source, with_tokenizer
from launch.attend import Outcome, attend
from launch.check import check_start
from launch.conclusion import conclude
from launch.data import check, check_named_data, keep_data, prepare
from launch.engines import AttendedEngine, Engine, QueuedEngine, check_not_queued, engine_of
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
    write_job,
)
from launch.status import RunStatus
from launch.weights import check_weights, keep_weights

HandOver = Callable[[QueuedEngine, Path, JobConfig], Queued]


@dataclass(frozen=True)
class SubmitOptions:
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


@dataclass(frozen=True)
class Checked:
    """A job in which nothing is wrong as far as can be told before anything is made."""

    job: JobConfig
    engine: Engine
    weights: Source | None
    """Those that a new run begins with, unless they are random."""


@dataclass(frozen=True)
class Resumption:
    """A run that can go on, and how."""

    run: Path
    before: JobConfig
    """The job as it is in the run."""
    checked: Checked
    request: ResumeRequest


@dataclass(frozen=True)
class Begun:
    """A run whose workers have ended, or whose job is queued; or that was given up before, with a reason printed."""

    run: Path
    job: JobConfig
    outcome: Outcome | Queued | int
    """An exit code where it was given up."""


def submit(job_file: Path | None, overrides: list[str], resume: str | None, options: SubmitOptions) -> int:
    """Train, or go on training. Returns the exit code; raises JobError, and leaves nothing, where the user errs."""
    console = SteadyConsole(stderr=options.as_json, highlight=False)
    resumption = None
    if resume is not None:
        run = find_run(resume)
        answer = check_resume(run, job_file, overrides, console, options)
        if isinstance(answer, RunStatus):
            outcome = Outcome(0, "finished", answer, 0.0)
            return conclude(outcome, run, load_job(run / "job.yaml"), console, as_json=options.as_json, already=True)
        resumption, checked = answer, answer.checked
    elif options.may_begin_again:
        raise JobError("--allow-from-scratch: only with --resume")
    elif job_file is None:
        raise JobError("nothing to train: give a job file, or --resume RUN")
    else:
        checked = check_submission(job_file, overrides, options, lambda line: print(line, file=sys.stderr))
    if options.dry_run:
        return _describe(checked.engine, resumption.run if resumption else next_run(checked.job), checked.job, options)
    with Interrupts() as interrupts:
        begun = go_on(resumption, interrupts, console) if resumption else begin(checked, interrupts, console)
        ended = begun.outcome
        if isinstance(ended, Queued):
            ended = _follow(checked.engine, begun.run, ended, interrupts, console, options)
    if isinstance(ended, int):
        return ended
    return conclude(ended, begun.run, begun.job, console, as_json=options.as_json)


def check_submission(
    job_file: Path, overrides: list[str], options: SubmitOptions, say: Callable[[str], None]
) -> Checked:
    """The job of a new run, checked. `say` gets a line of what was read otherwise than it was written. Raises JobError;
    makes nothing."""

    def notice(line: str) -> None:
        say(f"copus: {line}")

    job = portable(load_job(job_file, overrides, options.engine, notice=say))
    job = with_tokenizer(job, notice)
    training = job.training.model_copy(update={"reference_batch": job.reference_batch})  # whatever a resume changes
    job = job.model_copy(update={"training": training})
    engine = engine_of(job)
    _check_options(engine, job, options)
    check_named_data(job, overrides)
    _check_machine(job, engine)
    check_start(job)
    job, weights = check_weights(job, notice)
    return Checked(job, engine, weights)


def _check_machine(job: JobConfig, engine: Engine) -> None:
    """Raise JobError if files or packages that the job needs are missing here."""
    check(job)
    check_profiler(job, engine)
    if engine.own_software:
        return
    for name in job.tracking:
        try:
            check_installed(name)
        except ValueError as error:
            raise JobError(f"tracking.{name}: {error}") from None


def begin(
    checked: Checked,
    interrupts: Interrupts,
    console: Console,
    mark: Callable[[Path], None] | None = None,
    queue: HandOver = hand_over,
) -> Begun:
    """Make the run, prepare its data, and launch it. `mark` writes into the run that is made, which then has to have
    the job's name; `queue` hands it to a scheduler. Raises JobError, and leaves nothing, if the user errs."""
    engine, job = checked.engine, checked.job
    engine.ready(job)
    run = create_run(job, numbered=mark is None, mark=mark)
    with lock_run(run) as lock:
        code, job = prepare(job, run / "job.yaml", interrupts)
        code = code or keep_weights(run, job, checked.weights)
        if code:
            discard_run(run)
            return Begun(run, job, code)
        write_job(run, job)  # from here on the run names its data
        return Begun(
            run,
            job,
            _measure_and_launch(engine, run, job, lock, interrupts, console, partial(discard_run, run), queue),
        )


def _check_options(engine: Engine, job: JobConfig, options: SubmitOptions) -> None:
    """Raise JobError for what the engine cannot do."""
    if options.detach and not isinstance(engine, QueuedEngine):
        raise JobError(
            f"--detach: launch.engine({job.launch.engine}) has no queue: this command stays with the workers until "
            "they end"
        )


def check_resume(
    run: Path, job_file: Path | None, overrides: list[str], console: Console, options: SubmitOptions
) -> Resumption | RunStatus:
    """How a run would go on; its status if it has finished. Raises JobError if it cannot; changes nothing."""
    before = load_job(run / "job.yaml")
    job = portable(load_resized(job_file or run / "job.yaml", overrides, options.engine))
    job = settled(job, before)
    status = RunStatus()
    status.update(Follower(run).read())
    job = keep_data(run, portable(before), job, status)
    check_settings(run, portable(before), job, overrides)
    for checkpoint in checkpoint_names(run):
        check_same_data(run / FOLDER / checkpoint, job.data.prepared)
    finished = status.end is not None and status.end.reason == "finished"
    if finished and status.start is not None and job.total_samples <= status.start.total_samples:
        return status
    if job.training.backend != before.training.backend:
        console.print(f"goes on with the {job.training.backend} backend, not {before.training.backend}", markup=False)
    request = request_of(
        run,
        portable(before),
        job,
        overrides,
        from_file=job_file is not None,
        may_begin_again=options.may_begin_again,
    )
    engine = engine_of(job)
    _check_options(engine, job, options)
    _check_machine(job, engine)
    return Resumption(run, before, Checked(job, engine, None), request)


def go_on(resumption: Resumption, interrupts: Interrupts, console: Console) -> Begun:
    """Launch a run again. Raises JobError, and leaves it as it was, if the user errs."""
    run, before = resumption.run, resumption.before
    engine, job = resumption.checked.engine, resumption.checked.job
    for line in engine.ready_again(job):
        console.print(line, markup=False, soft_wrap=True)
    with lock_run(run) as lock:
        check_not_queued(run)
        clear_stop(run)
        if job != before:
            write_job(run, job)
        write_resume_request(run, resumption.request)

        def undo() -> None:
            write_job(run, before)
            write_resume_request(run, ResumeRequest())

        code, job = prepare(job, run / "job.yaml", interrupts)
        if code:
            undo()
            return Begun(run, job, code)
        if job != before:
            write_job(run, job)
        return Begun(run, job, _measure_and_launch(engine, run, job, lock, interrupts, console, undo))


def _measure_and_launch(
    engine: Engine,
    run: Path,
    job: JobConfig,
    lock: int,
    interrupts: Interrupts,
    console: Console,
    undo: Callable[[], None],
    queue: HandOver = hand_over,
) -> Outcome | Queued:
    """`_launch`, after a profiler that wants a process of its own has run, unless that did not end well."""
    measured = profile_alone(run, job, lock, interrupts, console, undo)
    if measured and measured.exit_code:
        return measured
    return _launch(engine, run, job, lock, interrupts, console, undo, queue)


def _launch(
    engine: Engine,
    run: Path,
    job: JobConfig,
    lock: int,
    interrupts: Interrupts,
    console: Console,
    undo: Callable[[], None],
    queue: HandOver,
) -> Outcome | Queued:
    """Run the job to its end, or hand it to a scheduler. `undo` is called if nothing came of either."""
    if isinstance(engine, QueuedEngine):
        try:
            return queue(engine, run, job)
        except JobError:
            undo()
            raise
    assert isinstance(engine, AttendedEngine), "there are two kinds"
    clear_ticket(run)
    return attend(engine, run, job, lock, interrupts, console, undo=undo)


def _follow(
    engine: Engine, run: Path, queued: Queued, interrupts: Interrupts, console: Console, options: SubmitOptions
) -> Outcome:
    """What becomes of a job that was handed over; only that it was, where nobody stays to see it."""
    assert isinstance(engine, QueuedEngine), "others are attended to the end"
    if options.detach:
        return Outcome(0, "queued", queued.status, 0.0)
    return follow_job(engine, run, queued, interrupts, console)


def _describe(engine: Engine, run: Path, job: JobConfig, options: SubmitOptions) -> int:
    """Print what would be done, so that the engine's own tools can read it."""
    text = engine.describe(run, job)
    print(
        as_json_line({"engine": job.launch.engine, "run": str(run), "description": text}) if options.as_json else text
    )
    return 0
