"""The predictor of a job file, for its workers and its profiling."""

from collections.abc import Iterable

from copus.backends.registry import find_backend
from copus.job import JobConfig
from planner.predictor import Predictor
from profiles.measurement import Measurement


def predictor_of(job: JobConfig, rows: Iterable[Measurement], *, use_cost_model: bool = True) -> Predictor:
    """`Predictor.from_rows` with everything that the job file says; `rows` share one fingerprint."""
    training = job.training
    return Predictor.from_rows(
        job.planner,
        job.model,
        job.cluster,
        training.precision,
        training.configuration,
        rows,
        training.implementation,
        backend=find_backend(training.backend).with_optimizer_of(training),
        use_cost_model=use_cost_model,
    )
