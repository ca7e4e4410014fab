"""`copus data`, and the data step of every command that trains: text to tokens, in a process of its own."""

import os
import sys
import tempfile
from pathlib import Path

from copus.job import JobConfig, JobError, load_job
from copus.weights.source import with_tokenizer
from launch.interrupts import Interrupts
from launch.json_output import as_json_line
from launch.process import python_module, run_module
from launch.run_directory import find_run, portable, shown, write_job
from launch.status import RunStatus
from profiles.table import ThroughputTable

INPUTS = (
    *("source", "weights", "text_column", "messages_column", "chat_template", "held_out", "held_out_share"),
    *("held_out_source", "tokenizer", "bos_token", "eos_token"),
)
"""Settings of the data section that prepared data is made from."""


def check(job: JobConfig, *, trains: bool = True) -> None:
    """Raise JobError if the text, the tokenizer or the throughput table of a job is wrong. Writes nothing.

    A job that `trains` has to keep the orders of its samples beside the prepared data, unless some are there already.
    """
    from copus.data.prepared import check_data, find_prepared

    check_data(job)
    check_table(job)
    folder = find_prepared(job) if trains else None
    if folder is not None and not (folder / "indices").is_dir() and not os.access(folder, os.W_OK):
        raise JobError(f"data.cache: {folder} cannot be written to, and the order of samples is kept in it")


def check_table(job: JobConfig) -> None:
    """Raise JobError if the throughput table of a job cannot be read or, if it is to be filled, added to."""
    table = ThroughputTable(job.profile.table)
    try:
        if job.profile.when == "never":
            table.check()
        else:
            table.check_writable()
    except OSError as error:
        raise JobError(f"profile.table({job.profile.table}): {error.strerror}") from None


def prepare(job: JobConfig, job_file: Path, interrupts: Interrupts) -> tuple[int, JobConfig]:
    """Prepare the data of a job unless it is there, and verify it if a file in it has changed since that was done.

    Both happen in a process that reads `job_file`; a file `stop` beside that one ends it, as an interrupt does. Returns
    its exit code, and the job with `data.prepared` filled in. If the code is not 0, the reason has been printed.
    """
    from copus.data.prepared import find_prepared, needs_verifying

    try:
        folder = find_prepared(job)
        if folder is None or needs_verifying(folder):
            command = python_module("copus.data", job_file)
            code = run_module(command, interrupts, stop=job_file.with_name("stop"))
            if code:
                return code, job
            folder = find_prepared(job)
        if folder is None:
            raise JobError("data.source: the text has changed since it was prepared; start again when it is complete")
    except JobError as error:
        print(f"copus: {error}", file=sys.stderr)
        return 2, job
    return 0, job.model_copy(update={"data": job.data.model_copy(update={"prepared": folder.name})})


def keep_data(run: Path, before: JobConfig, job: JobConfig, status: RunStatus) -> JobConfig:
    """The job with the run's own data, whatever has become of the text since.

    Raises JobError if the job asks for other data: by its digest, or by settings that give another one.
    """
    from copus.data.prepared import find_prepared

    digest = before.data.prepared or (status.start.data if status.start else None)
    if digest is None:  # nothing was trained on yet, or by an older version: the settings have to be the same
        return job
    for name in INPUTS:
        was, now = (data.model_dump(mode="json", include={name})[name] for data in (before.data, job.data))
        if was == now:
            continue
        prepared = find_prepared(job.model_copy(update={"data": job.data.model_copy(update={"prepared": None})}))
        if prepared is None or prepared.name != digest:
            raise JobError(
                f"{shown(run)}: data.{name} is {was} in this run and cannot become {now}: the run was trained on the "
                f"data {digest}, and this is " + (f"the data {prepared.name}" if prepared else "not prepared")
            )
    if job.data.prepared not in (None, digest):
        raise JobError(
            f"{shown(run)}: data.prepared is {digest} in this run and cannot become {job.data.prepared}: a run keeps "
            "its text and its tokenizer"
        )
    return job.model_copy(update={"data": job.data.model_copy(update={"prepared": digest})})


def check_named_data(job: JobConfig, overrides: list[str]) -> None:
    """Raise JobError if a job file names prepared data, as that of a run does, and a text that gives other data: nobody
    can tell which of them is meant, unless `--set` names it. A text that is gone contradicts nothing."""
    from copus.data.prepared import find_prepared

    if job.data.prepared is None or any(override.startswith("data.prepared=") for override in overrides):
        return
    try:
        other = find_prepared(job.model_copy(update={"data": job.data.model_copy(update={"prepared": None})}))
    except JobError:
        return
    if other is None or other.name != job.data.prepared:
        raise JobError(
            f"data.prepared({job.data.prepared}) is not what the fields beside it give now, "
            + (f"the data {other.name}" if other else "which is not prepared")
            + f": take it out of the job file, or say --set data.prepared={job.data.prepared}"
        )


def data(target: str, overrides: list[str], *, verify: bool = False, as_json: bool = False) -> int:
    """Prepare the data of a job file or a run, or compare it with its checksums, and print where it lies."""
    from copus.data.prepared import prepared_path

    job_file, run = _job_file(target)
    job = portable(load_job(job_file, overrides))
    if run is None:
        job = with_tokenizer(job, notice=lambda line: print(f"copus: {line}", file=sys.stderr))
        check_named_data(job, overrides)
    else:
        job = keep_data(run, portable(load_job(job_file)), job, RunStatus())
    check(job, trains=False)
    if verify:
        prepared_path(job)
    with tempfile.TemporaryDirectory() as folder, Interrupts() as interrupts:
        write_job(Path(folder), job)
        if verify:
            code = run_module(python_module("copus.data", "--verify", Path(folder) / "job.yaml"), interrupts)
        else:
            code, job = prepare(job, Path(folder) / "job.yaml", interrupts)
    if code == 0:
        path = str(prepared_path(job))
        if as_json:
            print(as_json_line({"prepared": path} | ({"verified": True} if verify else {})))
        else:
            print(f"{path}: every file is as it was prepared" if verify else path)
    return code


def _job_file(target: str) -> tuple[Path, Path | None]:
    """A job file, and the run that it is of if a run was named."""
    path = Path(target)
    if path.suffix in (".yaml", ".yml") or (path.exists() and not path.is_dir()):
        return path, None
    run = find_run(target)
    return run / "job.yaml", run
