"""`copus plan --backend A --backend B`: one job on several backends, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copus.estimate import estimate_of
from copus.job import JobConfig, JobError, load_job
from launch.json_output import as_json_line
from launch.plan import DISPENSABLE, as_values, fastest_row, on_backend
from launch.tables import page, print_facts, print_table
from profiles.formatting import count

if TYPE_CHECKING:  # numpy and scipy are loaded when the command runs
    from planner.job_estimate import Fastest, JobEstimate


@dataclass(frozen=True)
class _Planned:
    """The job on one backend."""

    backend: str
    job: JobConfig
    estimate: "JobEstimate"


def plan_backends(job_file: Path, overrides: list[str], backends: list[str], *, as_json: bool = False) -> int:
    """Print the fastest layouts of every global batch over all these backends in one table. A backend that does not run
    the job's layout begins in the nearest one that it runs.

    Raises JobError for a backend that is not installed or cannot train the model.
    """
    job = load_job(job_file, overrides)
    jobs = {backend: on_backend(job, backend) for backend in backends}
    planned = [_Planned(backend, there, estimate_of(there)) for backend, there in jobs.items()]
    if as_json:
        print(as_json_line({plan.backend: as_values(plan.job, plan.estimate) for plan in planned}))
        return 0
    console = page()
    heading = f"{job.name}: {count(job.model.parameters)} weights in {job.training.precision} on "
    heading += f"{job.cluster.accelerators} × {job.cluster.accelerator}"
    print_facts(heading, [(plan.backend, _source(plan)) for plan in planned], console)
    rows = sorted(
        ((fastest, plan) for plan in planned for fastest in plan.estimate.fastest()),
        key=lambda row: (row[0].best.configuration.global_batch, row[0].best.step_seconds or 0.0),
    )
    if not rows:
        raise JobError("no backend has a candidate that may be chosen: copus plan with one --backend says why")
    # A row says how sure a layout is to be faster than the next one of the same backend, not of another.
    table = [_row(fastest, plan.backend) for fastest, plan in rows]
    print_table("fastest layout of each global batch, by backend", table, console, DISPENSABLE)
    return 0


def _source(planned: _Planned) -> str:
    """Where a backend's times come from."""
    estimate = planned.estimate
    times = (
        f"{estimate.measured_rows} measured rows, the rest predicted from them"
        if estimate.measured_rows
        else "predicted by the cost model alone, which knows nothing of this framework"
    )
    return f"{len(estimate.candidates)} candidates, {times}"


def _row(fastest: "Fastest", backend: str) -> dict[str, Any]:
    row = fastest_row(fastest)
    return {"batch": row.pop("batch"), "backend": backend, **row}
