"""The smallest batch that uses the accelerators, and what accumulation on one replica is for (2507.07101: small batches
train as well per token, so a larger one has to earn its place by throughput)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from profiles.configuration import Configuration
from profiles.formatting import percent

if TYPE_CHECKING:  # the predictor asks the policies
    from planner.predictor import CandidateEstimate

SATURATED = 0.95
"""Share of the best throughput from which on a batch counts as using the accelerators."""


def smallest_saturating(estimates: "Sequence[CandidateEstimate]") -> "CandidateEstimate | None":
    """The smallest batch that reaches 95 % of the best throughput, in its fastest configuration; None if no throughput
    is known."""
    best = max((estimate.samples_per_second or 0.0 for estimate in estimates), default=0.0)
    enough = [estimate for estimate in estimates if (estimate.samples_per_second or 0.0) >= SATURATED * best > 0]
    return min(
        enough,
        key=lambda candidate: (candidate.configuration.global_batch, candidate.step_seconds or 0.0),
        default=None,
    )


def accumulation_purpose(
    chosen: Configuration, estimates: "Mapping[Configuration, CandidateEstimate]", max_micro_batch: int
) -> str:
    """What the micro-batches of a lone replica are for, in words: it could run them as one. Empty if it does, or if
    there are several replicas, which accumulate to reduce their gradients less often."""
    count, batch = chosen.num_microbatches, chosen.global_batch
    if chosen.layout.dp > 1 or count == 1:
        return ""
    said = f"{count} micro-batches on one replica"
    if chosen.layout.pp > 1:
        return f"{said} fill its {chosen.layout.pp} pipeline stages"
    if batch > max_micro_batch:
        return f"{said}, since max_micro_batch({max_micro_batch}) is less than the batch"
    at_once = estimates.get(chosen.model_copy(update={"micro_batch": batch}))
    if at_once is None:
        return f"{said}, since the models have ruled out a micro-batch of {batch}"
    if at_once.refusal:
        return f"{said}, since a micro-batch of {batch} may not be chosen: {at_once.refusal}"
    own = estimates[chosen].samples_per_second if chosen in estimates else None
    if own is None or at_once.samples_per_second is None:
        return f"{said}, since the throughput of a micro-batch of {batch} is not known"
    faster = own / at_once.samples_per_second - 1
    if faster <= 0:
        return f"{said}, which need less memory than a micro-batch of {batch}"
    return f"{said}, {percent(faster)} faster than a micro-batch of {batch}"
