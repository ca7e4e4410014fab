"""What measurements of a Megatron job are about. Imports no megatron: a process that only asks needs none."""

from importlib.metadata import version

from copus.hardware import hardware_name, software_name
from copus.job import JobConfig
from profiles.measurement import Fingerprint


def fingerprint(job: JobConfig) -> Fingerprint:
    """Model, precision and versions of a job, on the accelerators that this process sees."""
    return Fingerprint(
        model=job.model.digest,
        precision=job.training.precision,
        backend=f"megatron-core {version('megatron-core')}",
        hardware=hardware_name(job.cluster),
        software=software_name(),
    )
