"""Estimates for a job, for whoever looks ahead: `copus plan`, `copus simulate`, `copus.plan`."""

from typing import TYPE_CHECKING

from copus.backends.registry import BUILT_IN, find_backend
from copus.job import STEP_SETTINGS, JobConfig, JobError
from profiles.measurement import Fingerprint, Measurement
from profiles.table import ThroughputTable

if TYPE_CHECKING:  # numpy and scipy are loaded when a command asks
    from planner.job_estimate import JobEstimate


def estimate_of(job: JobConfig) -> "JobEstimate":
    """Estimate every candidate of a job. Raises JobError for a table that cannot be read and for a cluster that nothing
    is known about."""
    from planner.job_estimate import estimate_job

    training = job.training
    rows = rows_of_table(job)
    try:
        return estimate_job(
            job.planner,
            job.model,
            job.cluster,
            training.precision,
            training.configuration,
            rows,
            training.implementation,
            find_backend(training.backend).with_optimizer_of(training),
        )
    except ValueError as error:
        raise JobError(f"cluster.{error}") from None


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
