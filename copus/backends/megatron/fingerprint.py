"""What measurements of a Megatron job are about. Imports no megatron: a process that only asks needs none."""

from importlib.metadata import version

from copus.hardware import hardware_name, software_name
from copus.job import JobConfig
from profiles.measurement import OWN, Fingerprint


def fingerprint(job: JobConfig) -> Fingerprint:
    """Model, precision and versions of a job, on the accelerators that this process sees."""
    return Fingerprint(
        model=job.model.digest,
        precision=job.training.precision,
        backend=f"{OWN} {version('megatron-core')}",
        hardware=hardware_name(job.cluster),
        software=", ".join([software_name(), *job.training.step_settings]),
    )
