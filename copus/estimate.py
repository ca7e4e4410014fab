"""What is expected of a job: estimates for `copus plan`, `copus simulate` and `copus.plan`, and the predictor that its
workers and its profiling use."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from copus.backends.registry import BUILT_IN, find_backend
from copus.job import STEP_SETTINGS, JobConfig, JobError
from profiles.accelerator import accelerator
from profiles.measurement import Fingerprint, Measurement
from profiles.table import ThroughputTable

if TYPE_CHECKING:  # numpy and scipy are loaded when a command asks
    from planner.job_estimate import JobEstimate
    from planner.predictor import Predictor


def predictor_of(job: JobConfig, rows: Iterable[Measurement], *, use_cost_model: bool = True) -> "Predictor":
    """`Predictor.from_rows` with everything that the job file says; `rows` share one fingerprint."""
    from planner.predictor import Predictor

    return Predictor.from_rows(**_settings(job), rows=rows, use_cost_model=use_cost_model)


def estimate_of(job: JobConfig, stack: str | None = None) -> "JobEstimate":
    """Estimate every candidate of a job; times without a row are those of its backend's software, or of `stack`, and so
    is the memory that its kernels need.

    Raises JobError for a table that cannot be read, for a cluster that nothing is known about, for software that no
    published run is with, and for software on an accelerator whose times do not follow from published runs.
    """
    from planner.job_estimate import estimate_job
    from profiles.cost.effects import stacks

    settings = _settings(job)
    if stack is not None:
        if stack not in stacks():
            raise JobError(f"--stack({stack}): no published run is with it; expected one of {', '.join(stacks())}")
        if not _follows_published_runs(job.cluster.accelerator):
            raise JobError(
                f"--stack({stack}): cluster.accelerator({job.cluster.accelerator}) has no data sheet, and its times do "
                "not follow from published runs"
            )
        settings["implementation"] = settings["implementation"].as_stack(stack)
    rows = rows_of_table(job)
    try:
        return estimate_job(**settings, table=rows)
    except ValueError as error:
        raise JobError(f"cluster.{error}") from None


def _follows_published_runs(name: str) -> bool:
    """Whether the cost model multiplies the constants of an accelerator by what published runs say of software."""
    try:
        return accelerator(name).rated
    except ValueError:
        return False


def _settings(job: JobConfig) -> dict[str, Any]:
    """What the job file says of a prediction, by the names of the planner's parameters."""
    training = job.training
    return {
        "config": job.planner,
        "model": job.model,
        "cluster": job.cluster,
        "precision": training.precision,
        "start": training.configuration,
        "implementation": training.implementation,
        "backend": find_backend(training.backend).for_training(training),
    }


def rows_of_table(job: JobConfig) -> list[Measurement]:
    """The rows of the job's throughput table that were measured with its backend and settings, of any model. Raises
    JobError for a table that cannot be read."""
    try:
        return [row for row in ThroughputTable(job.profile.table).everything() if _ran_so(row.fingerprint, job)]
    except OSError as error:
        raise JobError(f"profile.table({job.profile.table}): {error.strerror}") from None


def _ran_so(fingerprint: Fingerprint, job: JobConfig) -> bool:
    """Whether a row was measured with the job's backend and settings. Imported rows do not say, and pass."""
    framework = fingerprint.backend.partition(" ")[0]
    if framework != find_backend(job.training.backend).framework:
        return framework not in {find_backend(name).framework for name in BUILT_IN}
    said = set(fingerprint.software.split(", "))
    return [name for name in STEP_SETTINGS if name in said] == job.training.step_settings
