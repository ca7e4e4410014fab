"""What the measurements of a job are about."""

from copus.backends.registry import find_backend
from copus.hardware import hardware_name, software_name
from copus.job import JobConfig
from profiles.measurement import Fingerprint


def fingerprint_of(job: JobConfig) -> Fingerprint:
    """Model, precision and versions of a job, on the accelerators that this process sees. Imports no framework."""
    return Fingerprint(
        model=job.model.digest,
        precision=job.training.precision,
        backend=find_backend(job.training.backend).software,
        hardware=hardware_name(job.cluster),
        software=", ".join([software_name(), *job.training.step_settings]),
    )
