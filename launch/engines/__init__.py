"""Where workers run. An engine starts them and hands back a handle; nothing else in `launch` knows how."""

from copus.job import JobConfig
from launch.engines.base import Engine, Workers
from launch.engines.local import LocalEngine


def engine_of(job: JobConfig) -> Engine:
    """The engine that `launch.engine` of a job names. Raises JobError where it cannot run this job."""
    engine = {"local": LocalEngine}[job.launch.engine]()
    engine.check(job)
    return engine


__all__ = ["Engine", "LocalEngine", "Workers", "engine_of"]
