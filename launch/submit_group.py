"""`copus submit --seeds N --matrix FIELD=V,V`: a group of runs, one after another, or all in a scheduler's queue."""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from copus.job import JobConfig, JobError, load_job
from launch.attend import Outcome
from launch.conclusion import headline
from launch.engines import QueuedEngine, engine_state
from launch.group import Planned, parse_matrix, plan_group, read_member, write_member
from launch.group_results import OVER, as_values, print_results, read_results
from launch.group_watch import Watch
from launch.interrupts import Interrupts
from launch.json_output import as_json_line
from launch.progress import SteadyConsole
from launch.queued import Queued, hand_over, hand_over_array, hold
from launch.run_directory import discard_run, portable, shown, typed
from launch.run_state import RunState, state_of
from launch.runs import status_of
from launch.status import RunStatus
from launch.submit import (
    Begun,
    Checked,
    HandOver,
    Resumption,
    SubmitOptions,
    begin,
    check_resume,
    check_submission,
    go_on,
)
from launch.tables import page

PLACES = {"name", "launch", "tracking", "profile"}
"""Sections of a job file that may differ between two calls of the command: they change no result."""


@dataclass(frozen=True)
class Submission:
    """A run of the group, checked."""

    planned: Planned
    run: Path
    checked: Checked
    todo: Literal["begin", "resume", "follow", "nothing"]
    resumption: Resumption | None
    state: RunState | None
    """Of the run that is there already."""

    @property
    def is_to_train(self) -> bool:
        """Whether it has to be started, or queued."""
        return self.todo in ("begin", "resume")


def submit_group(
    job_file: Path | None,
    overrides: list[str],
    matrix: Sequence[str],
    seeds: int | None,
    options: SubmitOptions,
    *,
    fail_fast: bool,
    at_once: int | None,
) -> int:
    """Train every run of the group that has not ended, with at most so many `at_once` in the queue. Returns the exit
    code. Raises JobError, before anything is made, if one of the jobs is wrong."""
    if job_file is None:
        raise JobError("--seeds, --matrix: nothing to train: give a job file")
    if fail_fast and options.detach:
        raise JobError("--fail-fast: with --detach nobody sees a run fail")
    if at_once is not None and at_once < 1:
        raise JobError(f"--at-once {at_once}: at least 1")
    console = SteadyConsole(stderr=options.as_json, highlight=False)
    fields = parse_matrix(matrix, overrides)
    first = [f"{field}={values[0]}" for field, values in fields.items()]  # the job file may leave them out
    base = portable(load_job(job_file, [*overrides, *first], options.engine))
    plan = plan_group(base, fields, seeds)
    said: set[str] = set()

    def say(line: str) -> None:
        if line not in said:
            print(line, file=sys.stderr)
        said.add(line)

    submissions = [_checked(planned, job_file, overrides, options, console, say) for planned in plan]
    _check_different(submissions)
    queued = isinstance(submissions[0].checked.engine, QueuedEngine)
    if at_once is not None and not queued:
        raise JobError(f"--at-once: launch.engine({base.launch.engine}) has no queue: one run trains after another")
    arrays = [] if at_once is not None and not options.detach else _arrays(submissions)
    to_train = sum(submission.is_to_train for submission in submissions)
    if at_once is not None and options.detach and [to_train] != [len(array) for array in arrays]:
        raise JobError("--at-once: with --detach nobody queues the next run, and the runs are not one array of Slurm")
    if options.dry_run:
        return _describe(base.name, submissions, arrays, at_once, options)
    failed: list[str] = []
    held = {submission.run for array in arrays for submission in array}
    followed = {one.run: one.checked.engine for one in submissions if one.todo == "follow"}
    watch = Watch(followed, sum(one.todo != "nothing" for one in submissions), console, fail_fast)
    with Interrupts() as interrupts:
        for number, submission in enumerate(submissions, start=1):
            if at_once is not None and submission.is_to_train and submission.run not in held:
                watch.until(at_once - 1, interrupts)
                if interrupts.count or (watch.failed and fail_fast):
                    break
            console.print(f"run {number} of {len(submissions)}: {_what(submission)}", markup=False, soft_wrap=True)
            code = _start(submission, interrupts, console, hold if submission.run in held else hand_over)
            if interrupts.count:
                break
            if code:
                failed.append(submission.planned.name)
                watch.total -= submission.todo != "nothing"
                if fail_fast:
                    break
            elif submission.is_to_train and submission.run not in held:
                watch.add(submission.run, submission.checked.engine)
        for array in [] if interrupts.count or (failed and fail_fast) else arrays:
            made = [submission for submission in array if submission.planned.name not in failed]
            if made and _queue_array(made, base.name, at_once, console):
                for submission in made:
                    watch.add(submission.run, submission.checked.engine)
            else:
                failed += [submission.planned.name for submission in made]
                watch.total -= len(made)
        if queued and failed and fail_fast:
            watch.withdraw()
        elif queued and not options.detach:
            watch.until(0, interrupts)
        failed += watch.failed
    exit_code = 1 if failed else 0
    if interrupts.signal:
        exit_code = 128 + interrupts.signal
    return _conclude(base, submissions, exit_code, console, options, queued=queued)


def _checked(
    planned: Planned,
    job_file: Path,
    overrides: list[str],
    options: SubmitOptions,
    console: Console,
    say: Callable[[str], None],
) -> Submission:
    """A run of the group, with every check that can be made now. Raises JobError."""
    checked = check_submission(job_file, [*overrides, *planned.overrides], options, say)
    run = checked.job.launch.runs / planned.name
    make = partial(Submission, planned, run, checked)
    if not run.exists():
        return make("begin", None, None)
    if not (run / "job.yaml").is_file() or read_member(run) != planned.member:
        raise JobError(f"{shown(run)} is there and is not a run of this group: name the group otherwise (--name)")
    _check_same_job(run, checked.job)
    status = status_of(run)
    state = state_of(run, status)
    if state.alive and isinstance(checked.engine, QueuedEngine):
        return make("follow", None, state)
    if state.alive:
        raise JobError(f"{shown(run)}: {state.name}; `copus cancel {typed(run)}` stops it")
    if status.end is not None and status.end.reason in OVER:
        return make("nothing", None, state)
    named = [override for override in overrides if not override.startswith(("name=", "launch.runs="))]
    settings = [setting for setting in planned.overrides if not setting.startswith("name=")]
    resumption = check_resume(run, job_file, [*named, *settings], console, options)
    if isinstance(resumption, RunStatus):
        return make("nothing", None, state)
    return make("resume", resumption, state)


def _check_different(submissions: Sequence[Submission]) -> None:
    """Raise JobError if two runs would be the same: 1e-3 and 0.001 are one learning rate."""
    names: dict[str, str] = {}
    for submission in submissions:
        name, job = submission.planned.name, submission.checked.job.model_dump_json(exclude={"name"})
        if job in names:
            raise JobError(f"--matrix: {names[job]} and {name} would be the same job")
        names[job] = name


def _check_same_job(run: Path, job: JobConfig) -> None:
    """Raise JobError if a run was begun with other settings than the command has now."""
    from launch.report.comparison import differences, flat

    jobs = {
        when: flat(value.model_dump(mode="json", exclude=PLACES | {"data"}))
        | flat({"data": value.data.model_dump(mode="json", exclude={"prepared", "cache"})})
        for when, value in (("then", portable(load_job(run / "job.yaml"))), ("now", job))
    }
    for field, (then, now) in differences(jobs).items():
        raise JobError(
            f"{shown(run)}: {field} is {then} in this run of the group, and {now} now: name another group (--name), or "
            "remove the run"
        )


def _arrays(submissions: Sequence[Submission]) -> list[list[Submission]]:
    """The new runs that may be queued as one job of the scheduler: two or more with the same needs."""
    alike: defaultdict[str, list[Submission]] = defaultdict(list)
    for submission in submissions:
        engine = submission.checked.engine
        if isinstance(engine, QueuedEngine) and submission.todo == "begin":
            needs = engine.array_key(submission.checked.job)
            if needs is not None:
                alike[needs].append(submission)
    return [members for members in alike.values() if len(members) > 1]


def _queue_array(array: Sequence[Submission], group: str, at_once: int | None, console: Console) -> bool:
    """Queue runs that have been made. If the scheduler refuses, says why and removes them."""
    engine, runs = array[0].checked.engine, [submission.run for submission in array]
    assert isinstance(engine, QueuedEngine), "so `_arrays` has chosen"
    try:
        hand_over_array(engine, runs, array[0].checked.job, group, at_once)
    except JobError as error:
        print(f"copus: {group}: {error}", file=sys.stderr)
        for run in runs:
            discard_run(run)
        return False
    for run in runs:
        console.print(f"{run.name}: {engine_state(run).words}", markup=False, soft_wrap=True)
    return True


def _what(submission: Submission) -> str:
    """A run and what is done with it, in words."""
    state = submission.state
    words = {
        "begin": "",
        "resume": " is resumed",
        "follow": f": {state.name}" if state else "",
        "nothing": f" has ended: {state.why or state.name}" if state else "",
    }
    return f"{shown(submission.run)}{words[submission.todo]}"


def _describe(
    group: str,
    submissions: Sequence[Submission],
    arrays: Sequence[Sequence[Submission]],
    at_once: int | None,
    options: SubmitOptions,
) -> int:
    """Print what would be done, as the engine's own tools take it, below comments."""
    described: list[dict[str, Any]] = []
    last = {array[-1].run: array for array in arrays}
    held = {submission.run for array in arrays for submission in array}
    for submission in submissions:
        engine, job = submission.checked.engine, submission.checked.job
        text = None
        if (array := last.get(submission.run)) is not None:
            assert isinstance(engine, QueuedEngine), "so `_arrays` has chosen"
            text = engine.describe_array([one.run for one in array], job, group, at_once)
        elif submission.is_to_train and submission.run not in held:
            text = engine.describe(submission.run, job)
        described.append({"run": str(submission.run), "todo": submission.todo, "description": text})
        if not options.as_json:
            print(f"{engine.between}# {_what(submission)}" + (f"\n{text}" if text else ""))
    if options.as_json:
        engine_name = submissions[0].checked.job.launch.engine
        print(as_json_line({"group": group, "engine": engine_name, "runs": described}))
    return 0


def _start(submission: Submission, interrupts: Interrupts, console: Console, queue: HandOver) -> int:
    """Run, or queue, a run of the group. Returns 0 unless it failed; then the reason has been printed."""
    try:
        if submission.resumption:
            begun = go_on(submission.resumption, interrupts, console)
        elif submission.todo == "begin":
            mark = partial(write_member, member=submission.planned.member)
            begun = begin(submission.checked, interrupts, console, mark, queue)
        else:
            diverged = submission.state is not None and submission.state.name == "failed"
            return int(diverged)
        if queue is hold and isinstance(begun.outcome, Queued):
            return 0
    except JobError as error:
        print(f"copus: {submission.planned.name}: {error}", file=sys.stderr)
        return 1
    return _told(begun, console)


def _told(begun: Begun, console: Console) -> int:
    """Say how a run ended. Returns 0 unless it failed."""
    if isinstance(begun.outcome, int):
        return begun.outcome
    if isinstance(begun.outcome, Outcome):
        console.print(f"  {headline(begun.outcome)}", markup=False, soft_wrap=True)
        return begun.outcome.exit_code
    console.print(f"  {engine_state(begun.run).words}", markup=False, soft_wrap=True)
    return 0


def _conclude(
    base: JobConfig,
    submissions: Sequence[Submission],
    exit_code: int,
    console: Console,
    options: SubmitOptions,
    *,
    queued: bool,
) -> int:
    """Print the table of results, and what shows it again."""
    results = read_results([submission.run for submission in submissions if submission.run.exists()])
    if options.as_json:
        print(as_json_line({"group": base.name, "exit_code": exit_code, "cells": as_values(results)}))
        return exit_code
    if any(result.ended for result in results):
        print_results(base.name, results, page())
    lines = []
    open_runs = len(submissions) - sum(result.over for result in results)
    if open_runs:
        is_left = queued and any(result.state.alive for result in results)
        running = "; queued jobs keep running without this command" if is_left else ""
        lines.append(
            f"{open_runs} of {len(submissions)} runs have not ended: the same command goes on with them{running}"
        )
    if results:
        folder = base.launch.runs
        place = "" if folder == Path.cwd() / "runs" else f" {typed(folder)}"
        lines.append(f"  results     copus runs{place} --group {base.name}")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    return exit_code
