"""Planning from Python: what to expect of a job before it runs, and what to run next while it does."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from copus.backends.registry import find_backend
from copus.estimate import estimate_of, predictor_of, rows_of_table
from copus.job import JobConfig, load_job
from copus.learning_rate import lr_decay
from planner import planner
from planner.job_estimate import rows_of
from planner.policies.policy import make_policy
from profiles.measurement import Measurement

if TYPE_CHECKING:
    from planner.job_estimate import JobEstimate


def plan(job: JobConfig | Path | str, overrides: Sequence[str] = ()) -> "JobEstimate":
    """Everything that `copus plan` expects of a job: every configuration with its step time, memory and whether it may
    be chosen, the fastest one of each global batch (`fastest()`), and the best one by noise scale (`by_noise`).

    `job` is a loaded job or the path of a job file; `overrides` are `section.field=value`, as for `--set`. It needs no
    accelerator: rows of the throughput table count if there are any, and the cost and memory models fill in the rest.
    Raises JobError for a job file that is wrong, a table that cannot be read, and an accelerator without a data sheet.
    """
    return estimate_of(_loaded(job, overrides, planned_only=True))


class Planner(planner.Planner):
    """The planner of a job: `decide` scores every configuration from the noise scale and from what is known of
    throughput, and says what should run next and why.

    It learns while training goes on if it is fed every step (`observe_step`, `observe_loss`) and every move
    (`observe_move`). Decisions are deterministic.
    """

    def __init__(
        self,
        job: JobConfig | Path | str,
        rows: Iterable[Measurement] | None = None,
        number: int = 0,
    ) -> None:
        """`job` is a loaded job or the path of a job file. `rows` are measurements of one fingerprint; None takes those
        of the job's throughput table that fit its model and cluster. `number` is that of the next decision.

        Raises JobError for a job file that is wrong or a table that cannot be read.
        """
        self.job = job = _loaded(job)
        """The job that is planned."""
        if rows is None:
            backend = find_backend(job.training.backend)
            rows = rows_of(rows_of_table(job), job.model, job.cluster, job.training.precision, backend)
        # A policy that takes every time for a measured one must not see what the cost model alone predicts.
        predictor = predictor_of(job, rows, use_cost_model=make_policy(job.planner).weighs_error)
        super().__init__(
            predictor,
            number,
            job.total_samples,
            lambda samples: lr_decay(job, samples),
            job.training.target_loss,
            from_scratch=job.training.init_from is None,
        )


def _loaded(job: JobConfig | Path | str, overrides: Sequence[str] = (), *, planned_only: bool = False) -> JobConfig:
    if isinstance(job, JobConfig):
        if overrides:
            raise ValueError("overrides are for the path of a job file: a loaded job has its values already")
        return job
    return load_job(Path(job), list(overrides), planned_only=planned_only)
