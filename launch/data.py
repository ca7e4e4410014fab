"""`copus data`, and the data step of every command that trains: text to tokens, in a process of its own."""

import json
import tempfile
from pathlib import Path

from copus.job import JobConfig, JobError, load_job
from launch.interrupts import Interrupts
from launch.process import python_module, run_module
from launch.run_directory import portable, write_job
from profiles.table import ThroughputTable


def check(job: JobConfig) -> None:
    """Raise JobError where the text, the tokenizer or the throughput table of a job is wrong. Writes nothing."""
    from copus.data.prepared import check_data

    check_data(job)
    check_table(job)


def check_table(job: JobConfig) -> None:
    """Raise JobError where the throughput table of a job cannot be read or, if it is to be filled, added to."""
    table = ThroughputTable(job.profile.table)
    try:
        if job.profile.when == "never":
            table.check()
        else:
            table.check_writable()
    except OSError as error:
        raise JobError(f"profile.table({job.profile.table}): {error.strerror}") from None


def prepare(job: JobConfig, job_file: Path, interrupts: Interrupts) -> int:
    """Prepare the job's data unless it is there, with `job_file` as what the process reads. Returns its exit code.

    The file `stop` beside that one ends it, as an interrupt does.
    """
    from copus.data.prepared import is_prepared

    if is_prepared(job):
        return 0
    return run_module(python_module("copus.data", job_file), interrupts, stop=job_file.with_name("stop"))


def data(job_file: Path, overrides: list[str], *, as_json: bool = False) -> int:
    """Prepare the data of a job file and print where it lies."""
    from copus.data.prepared import prepared_path

    job = portable(load_job(job_file, overrides))
    check(job)
    with tempfile.TemporaryDirectory() as folder, Interrupts() as interrupts:
        write_job(Path(folder), job)
        code = prepare(job, Path(folder) / "job.yaml", interrupts)
    if code == 0:
        path = str(prepared_path(job))
        print(json.dumps({"prepared": path}) if as_json else path)
    return code
