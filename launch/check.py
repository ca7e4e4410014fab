"""What nobody wants of a new run, said before it starts. A run that goes on on other ranks may have come to it."""

import warnings

from copus.job import JobConfig, JobError
from planner.sampling import check_measurable, too_short
from planner.space import check_limits


def check_start(job: JobConfig) -> None:
    """Raise JobError for a step longer than the run, for a planner that has nothing to choose from, and for a noise
    scale that cannot be measured. Warn of a run that ends before anything can be decided."""
    training = job.training
    if training.global_batch > job.total_samples:
        raise JobError(
            f"training.global_batch({training.global_batch}) is more than the whole run: training.tokens"
            f"({training.tokens}) ÷ model.seq_len({job.model.seq_len}) = {job.total_samples} sequences"
        )
    sequences, accelerators = training.evaluate_sequences, job.cluster.accelerators
    if sequences % accelerators:
        raise JobError(
            f"training.evaluate_sequences({sequences}) ÷ {accelerators} accelerators is not whole: "
            f"{sequences / accelerators:g}; every layout has to evaluate the same ones"
        )
    if job.planner.policy == "static":
        return
    try:
        check_limits(job.planner, job.model, job.cluster, training.layout)
        check_measurable(job.planner, training.configuration)
    except ValueError as error:
        raise JobError(f"planner: {error}") from None
    if warning := too_short(job.planner, training.configuration, job.total_samples):
        warnings.warn(warning, stacklevel=2)
