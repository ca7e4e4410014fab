"""What a job's trackers need on the machine that trains."""

from copus.job import JobConfig, JobError
from copus.trackers import check_installed


def check_trackers(job: JobConfig) -> None:
    """Raise JobError, with what to install, if the package of a tracker is missing here."""
    for name in job.tracking:
        try:
            check_installed(name)
        except ValueError as error:
            raise JobError(f"tracking.{name}: {error}") from None
