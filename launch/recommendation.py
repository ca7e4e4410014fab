"""What `copus plan` ends with: the configuration to begin in, what the run takes in it, and the lines to paste."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from copus.job import JobConfig
from launch.tables import PASTED
from profiles.configuration import Configuration
from profiles.formatting import count, duration, percent, three_digits
from profiles.noise_scale import NoiseScale

if TYPE_CHECKING:  # numpy and scipy are loaded when the command runs
    from planner.job_estimate import JobEstimate
    from planner.predictor import CandidateEstimate

STAGES = 20
"""Equal parts of the run that the best configuration is looked up for."""


@dataclass(frozen=True)
class Recommendation:
    """A configuration, and what the whole run would take in it."""

    estimate: "CandidateEstimate"
    """What is expected of it."""
    reason: str
    """Why, in one line: what the planner says when such a job begins."""
    speedup: float | None
    """Its samples per second over those of the job file's configuration; None if that one's are not known."""
    runner_up: "CandidateEstimate | None"
    """The fastest configuration of another layout at its batch."""
    sure: float | None
    """Probability that it is faster than the runner-up; None without one."""
    tokens_per_second: float
    """Throughput."""
    later: list[tuple[float, "CandidateEstimate"]]
    """The best configurations after that, if critical batches grow as published laws say: share of the run, and what is
    best from there on."""
    run_seconds: float
    """Time for all tokens of the job on that schedule."""
    accelerator_hours: float
    """That, times the number of accelerators."""
    price: float | None
    """Price of these at `--price`; None if no price was given."""


def recommend(job: JobConfig, estimate: "JobEstimate", price_per_hour: float | None) -> Recommendation | None:
    """The configuration that the job's policy begins in, before any noise scale is known. None if no configuration may
    be chosen, or the step time of the policy's choice is not known."""
    from planner.planner import Planner

    planner = Planner(estimate.predictor, total_samples=job.total_samples, target_loss=job.training.target_loss)
    unknown = NoiseScale(grad_sq=0.0, noise_trace=0.0, value=None, low=None, high=None, samples=0)
    decision = planner.decide(unknown, estimate.start.configuration, 0)
    chosen = estimate.predictor.estimate(decision.advised or decision.chosen)
    rate = chosen.samples_per_second
    if rate is None or not chosen.can_run:
        return None
    fastest = next((row for row in estimate.fastest() if row.best.configuration == chosen.configuration), None)
    later, seconds = _by_laws(job, estimate, chosen)
    hours = seconds / 3600 * job.cluster.accelerators
    before = estimate.start.samples_per_second
    return Recommendation(
        estimate=chosen,
        reason=decision.reason,
        speedup=rate / before if before else None,
        runner_up=fastest.runner_up if fastest else None,
        sure=fastest.sure if fastest else None,
        tokens_per_second=rate * job.model.seq_len,
        later=later,
        run_seconds=seconds,
        accelerator_hours=hours,
        price=None if price_per_hour is None else hours * price_per_hour,
    )


def _by_laws(
    job: JobConfig, estimate: "JobEstimate", start: "CandidateEstimate"
) -> "tuple[list[tuple[float, CandidateEstimate]], float]":
    """What is best after the start while the critical batch grows as laws say, and the seconds of the whole run. A
    policy that keeps its configuration keeps the start."""
    import numpy as np

    from planner.forecast import CriticalBatchForecast
    from planner.goodput import goodput

    config, total = job.planner, job.total_samples
    able = [fastest.best for fastest in estimate.fastest()] if config.policy in ("goodput", "copus") else []
    laws = CriticalBatchForecast.of_laws(total, job.model)
    later, seconds, runs = list[tuple[float, "CandidateEstimate"]](), 0.0, start
    for stage in range(STAGES):
        place = (stage + 0.5) / STAGES
        phi = float(laws.at(np.array([place * total]))[0])

        def score(candidate: "CandidateEstimate", phi: float = phi) -> float:
            rate = candidate.samples_per_second or 0.0
            return float(goodput(rate, candidate.configuration.global_batch, phi, config.objective))

        best = max(able, key=score, default=runs)
        if best.configuration.global_batch > runs.configuration.global_batch:  # a schedule grows
            runs = best
            later.append((stage / STAGES, best))
        seconds += total / STAGES / (runs.samples_per_second or 1.0)
    return later, seconds


def recommendation_facts(
    job: JobConfig, recommendation: Recommendation, memory: str
) -> tuple[str, list[tuple[str, str]]]:
    """The recommendation for people: a heading, and names with values below it. `memory` says how much the
    configuration needs, and whether it fits."""
    estimate = recommendation.estimate
    rate = estimate.samples_per_second or 0.0
    speed = f"{count(recommendation.tokens_per_second)} tokens/s ({three_digits(rate)} samples/s), {estimate.source}"
    if estimate.step_seconds_low and estimate.step_seconds_high:
        tokens = estimate.configuration.global_batch * job.model.seq_len
        low, high = (tokens / seconds for seconds in (estimate.step_seconds_high, estimate.step_seconds_low))
        speed += f", 80 %: {count(low)} to {count(high)}"
    if estimate.mfu is not None:
        speed += f"; MFU {percent(estimate.mfu)}"
    if recommendation.speedup is not None and estimate.configuration != job.training.configuration:
        speed += f"; ×{recommendation.speedup:.2f} of the job file's"
    price = "" if recommendation.price is None else f", price {three_digits(recommendation.price)}"
    run = (
        f"{count(job.training.tokens)} tokens in {duration(recommendation.run_seconds)}, "
        f"{three_digits(recommendation.accelerator_hours)} accelerator-hours{price}"
    )
    later = [f"{best.configuration.label} from {percent(place)}" for place, best in recommendation.later]
    return f"recommended: begin in {estimate.configuration.label}", [
        ("why", recommendation.reason),
        ("speed", speed),
        *_sure(recommendation),
        *([("later", f"by the same laws {', '.join(later)} of the run")] if later else []),
        ("run", run),
        ("memory", memory),
        ("tools", "copus plan JOB.yaml --emit TOOL prints the arguments of Megatron-LM and others"),
        (PASTED, f"training: {flow(estimate.configuration)}"),
    ]


def _sure(recommendation: Recommendation) -> list[tuple[str, str]]:
    """The line about the next layout; none without one."""
    sure, other = recommendation.sure, recommendation.runner_up
    if sure is None or other is None:
        return []
    layout = other.configuration.layout.label
    return [("sure", f"{percent(min(sure, 0.99))}: faster than {layout}, the next layout at this batch")]


def flow(configuration: Configuration) -> str:
    """The settings of a configuration on one line of YAML, without those that are as usual."""
    layout = configuration.layout.model_dump(mode="json", exclude_defaults=True)
    values = {
        "layout": layout or {"dp": 1},
        "micro_batch": configuration.micro_batch,
        "global_batch": configuration.global_batch,
    }
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip()


def as_values(recommendation: Recommendation | None) -> dict[str, Any] | None:
    """The recommendation as plain values, for `--json`."""
    if recommendation is None:
        return None
    return {
        "label": recommendation.estimate.configuration.label,
        "configuration": recommendation.estimate.configuration.model_dump(mode="json"),
        "reason": recommendation.reason,
        "speedup": recommendation.speedup,
        "sure": recommendation.sure,
        "tokens_per_second": recommendation.tokens_per_second,
        "later": [
            {"share": share, "configuration": best.configuration.model_dump(mode="json")}
            for share, best in recommendation.later
        ],
        "run_seconds": recommendation.run_seconds,
        "accelerator_hours": recommendation.accelerator_hours,
        "price": recommendation.price,
    }
