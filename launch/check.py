"""Checks for new runs only; a run that resumes on other ranks may violate them."""

import warnings

from copus.backends.registry import find_backend
from copus.job import JobConfig, JobError
from planner.sampling import check_measurable, too_short
from planner.space import check_limits


def check_start(job: JobConfig) -> None:
    """Raise JobError for a step longer than the run, for a planner that has nothing to choose from, and for a noise
    scale that cannot be measured. Warn of a run that ends before anything can be decided, and of a `min_lr` that was
    set for a learning rate without a decay."""
    training = job.training
    # The job file that a run leaves has every field, one that was imported the other tool's default, which is 0.
    if training.decay == "constant" and training.min_lr not in (type(training).model_fields["min_lr"].default, 0.0):
        warnings.warn(
            f"training.min_lr({training.min_lr:g}) is not used: with training.decay(constant) the learning rate stays "
            f"at training.lr({training.lr:g})",
            stacklevel=2,
        )
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
    backend = find_backend(training.backend).for_training(training)
    try:
        check_measurable(job.planner, backend, training.configuration)
        if job.planner.policy == "static":
            return
        check_limits(job.planner, job.model, job.cluster, training.layout, backend, training.precision)
    except ValueError as error:
        raise JobError(f"planner: {error}") from None
    if warning := too_short(job.planner, training.configuration, job.total_samples):
        warnings.warn(warning, stacklevel=2)
