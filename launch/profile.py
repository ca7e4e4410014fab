"""`copus profile`: measure the throughput of a job's configurations and keep it."""

import json
from pathlib import Path

from copus.job import load_job
from launch.attend import attend
from launch.data import check, prepare
from launch.engines import engine_of
from launch.interrupts import Interrupts
from launch.progress import SteadyConsole
from launch.run_directory import create_run, discard_run, lock_run, portable


def profile(job_file: Path, overrides: list[str], *, as_json: bool = False) -> int:
    """Start the workers only to fill the throughput table. Prints where the table lies; returns the exit code."""
    job = portable(load_job(job_file, overrides))
    if job.profile.when == "never":  # about training, and this command is no training
        job = job.model_copy(update={"profile": job.profile.model_copy(update={"when": "missing"})})
    engine = engine_of(job)
    check(job)
    with Interrupts() as interrupts:
        run = create_run(job, suffix="-profile")
        with lock_run(run) as lock:
            code = prepare(job, run / "job.yaml", interrupts)
            if code:
                discard_run(run)
                return code
            outcome = attend(
                engine, run, job, lock, interrupts, SteadyConsole(stderr=True, highlight=False), profile_only=True
            )
    last = outcome.status.profile
    measured = last.done if last else 0
    if as_json:
        result = {
            "table": str(job.profile.table),
            "run": str(run),
            "measured": measured,
            "exit_code": outcome.exit_code,
        }
        print(json.dumps(result))
    elif outcome.exit_code == 0:
        print(f"{measured} measured" if measured else "nothing was missing", f"in {job.profile.table}")
    return outcome.exit_code
