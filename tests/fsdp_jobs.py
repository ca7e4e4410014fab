"""A tiny job for tests that train with FSDP."""

from typing import Any

from copus.backends.fsdp.backend import FsdpBackend
from copus.job import JobConfig
from tests.megatron_jobs import tiny_job
from tests.ranks import own_device


def fsdp_job(
    accelerators: int, layout: dict[str, Any], model: dict[str, Any] | None = None, **training: Any
) -> JobConfig:
    """The same as Megatron's, but for the backend."""
    return tiny_job(accelerators, layout, model, backend="fsdp", **training)


def fsdp_backend_of(job: JobConfig) -> FsdpBackend:
    """The job's backend, built in the configuration that the job starts with."""
    backend = FsdpBackend(job, own_device())
    backend.build(job.training.configuration)
    return backend
