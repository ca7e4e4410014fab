"""What `copus plan` says of small batches: the smallest one that uses the accelerators, and its memory with each
optimizer."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from copus.backends.registry import find_backend
from copus.job import JobConfig, TrainingConfig
from copus.optimizers import Optimizer
from profiles.formatting import gibibytes, percent, three_digits

if TYPE_CHECKING:  # numpy and scipy are loaded when the command runs
    from planner.job_estimate import JobEstimate
    from planner.predictor import CandidateEstimate


@dataclass(frozen=True)
class SmallestBatch:
    """The smallest batch that reaches 95 % of the best throughput."""

    estimate: "CandidateEstimate"
    """Its fastest configuration."""
    share: float
    """Of the best throughput."""
    accumulation: str
    """What the micro-batches of a lone replica are for; empty if there is no such accumulation."""
    peak_bytes: dict[str, float]
    """Memory of the fullest rank, by kind of optimizer that the backend runs in its layout; the job's own first."""


def smallest_batch(job: JobConfig, estimate: "JobEstimate") -> SmallestBatch | None:
    """Of what fits, predicted or measured; None if nothing does, or no throughput is known."""
    from planner.small_batch import accumulation_purpose, smallest_saturating

    able = [candidate for candidate in estimate.candidates if candidate.can_run]
    smallest = smallest_saturating(able)
    if smallest is None:
        return None
    best = max(candidate.samples_per_second or 0.0 for candidate in able)
    estimates = {candidate.configuration: candidate for candidate in estimate.candidates}
    purpose = accumulation_purpose(smallest.configuration, estimates, job.planner.max_micro_batch)
    return SmallestBatch(smallest, (smallest.samples_per_second or 0.0) / best, purpose, _peaks(job, smallest))


def _peaks(job: JobConfig, smallest: "CandidateEstimate") -> dict[str, float]:
    """By the formulas alone, but for the job's own optimizer, whose rows have taught the model."""
    from planner.memory_check import MemoryCheck
    from planner.sampling import measured_configuration

    own, backend = job.training.optimizer, find_backend(job.training.backend)
    peaks: dict[str, float] = {own.kind: smallest.peak.expected_bytes}
    for kind in backend.optimizers:
        optimizer = TypeAdapter(Optimizer).validate_python({"kind": kind})
        training = job.training.model_copy(update={"optimizer": optimizer})
        if kind == own.kind or not _runs(training, smallest):
            continue
        measured = partial(measured_configuration, job.planner, backend)
        check = MemoryCheck(job.model, job.cluster, training.precision, (), training.implementation, measured)
        peaks[kind] = check.peaks([smallest.configuration])[0].expected_bytes
    return peaks


def _runs(training: TrainingConfig, smallest: "CandidateEstimate") -> bool:
    try:
        find_backend(training.backend).for_training(training).check_optimizer_in(smallest.configuration.layout)
    except ValueError:
        return False
    return True


def smallest_batch_facts(smallest: SmallestBatch) -> tuple[str, list[tuple[str, str]]]:
    """A heading, and names with values below it."""
    estimate = smallest.estimate
    memory = ", ".join(f"{kind} {gibibytes(peak)}" for kind, peak in smallest.peak_bytes.items())
    heading = (
        f"smallest batch at 95 % of the best throughput: {estimate.configuration.global_batch} "
        f"({estimate.configuration.label}, {three_digits(estimate.samples_per_second or 0.0)} samples/s, "
        f"{percent(smallest.share)} of the best)"
    )
    accumulation = [("accumulates", smallest.accumulation)] if smallest.accumulation else []
    return heading, [*accumulation, ("memory", memory)]


def as_values(smallest: SmallestBatch) -> dict[str, Any]:
    """As plain values, for `--json`."""
    return {
        "configuration": smallest.estimate.configuration.model_dump(mode="json"),
        "label": smallest.estimate.configuration.label,
        "samples_per_second": smallest.estimate.samples_per_second,
        "share_of_best": smallest.share,
        "accumulation": smallest.accumulation,
        "peak_bytes": smallest.peak_bytes,
    }
