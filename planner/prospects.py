"""What is to be expected of a job's configurations before it is launched: `copus plan` shows it."""

import math
from dataclasses import dataclass

import numpy as np

from planner.config import PlannerConfig
from planner.goodput import goodput
from profiles.configuration import Configuration
from profiles.measurement import Fingerprint
from profiles.online import Covariance

NOISE_SCALES = 2.0 ** np.arange(-2, 24.01, 0.25)
"""Noise scales that the best configuration is looked up for, sequences."""


@dataclass(frozen=True)
class Expectation:
    """One configuration. Intervals hold 80 % of what is expected."""

    configuration: Configuration
    """The candidate."""
    step_seconds: float | None
    """Duration of a step; None where it is known to fail."""
    step_seconds_low: float | None
    """Lower end of its interval."""
    step_seconds_high: float | None
    """Upper end."""
    source: str
    """measured, interpolated, extrapolated: the throughput table. predicted: the cost model."""
    peak_bytes: float
    """Largest memory of any rank: as measured, else as the memory model says."""
    peak_bytes_low: float
    """Lower end of its interval; the same where it was measured."""
    peak_bytes_high: float
    """Upper end."""
    memory: dict[str, float]
    """What the memory model says, part by part, bytes."""
    last_stage: bool
    """Whether that is a rank of the last pipeline stage."""
    chance_to_fit: float | None
    """Probability that it fits; None where that is not asked (CPU cores, an accelerator without a file)."""
    refusal: str
    """Why the planner would not choose it; empty where it may."""
    peak_samples_per_second: float | None
    """Throughput at the accelerators' rated peak; None where no data sheet says it."""

    @property
    def samples_per_second(self) -> float | None:
        """Throughput, sequences a second."""
        return None if self.step_seconds is None else self.configuration.global_batch / self.step_seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization, 0 to 1; None where the peak is not rated or the configuration fails."""
        speed, peak = self.samples_per_second, self.peak_samples_per_second
        return None if speed is None or peak is None else speed / peak


@dataclass(frozen=True)
class Fastest:
    """The fastest configuration of one global batch."""

    best: Expectation
    """The configuration."""
    runner_up: Expectation | None
    """The fastest one of another layout."""
    sure: float | None
    """Probability that it is faster than that; None without a runner-up."""


@dataclass(frozen=True)
class NoiseRange:
    """The best configuration between two noise scales."""

    low: float
    """From this noise scale on, sequences; 0 for the first."""
    high: float
    """Up to this one; infinite for the last."""
    best: Expectation
    """Highest Goodput throughout."""


@dataclass(frozen=True)
class Prospects:
    """Everything that is expected of a job."""

    expectations: list[Expectation]
    """Every candidate, in the planner's order."""
    start: Expectation
    """The configuration that the job starts with."""
    variants: list[Expectation]
    """The same with every recomputation and ZeRO stage that was asked for, and split sequences where tp > 1."""
    memory_bytes: float | None
    """Of one accelerator; None where memory is not checked."""
    fingerprint: Fingerprint | None
    """Whose measured rows were used; None where there are none."""
    measured_rows: int
    """How many steps were measured."""
    measured_shards: int
    """How many shards one accelerator ran alone."""
    assumptions: tuple[str, ...]
    """What was taken for granted."""
    covariance: Covariance
    """Of the logarithms of predicted step times: two predictions are mostly wrong together."""

    @property
    def eligible(self) -> list[Expectation]:
        """Those that may be chosen."""
        return [each for each in self.expectations if not each.refusal and each.step_seconds is not None]

    @property
    def smallest(self) -> Expectation:
        """The candidate that needs the least memory."""
        return min(self.expectations, key=lambda each: each.peak_bytes)

    def fastest(self) -> list[Fastest]:
        """For each global batch, ascending; batches at which nothing may be chosen are left out."""
        by_batch: dict[int, list[Expectation]] = {}
        for each in self.eligible:
            by_batch.setdefault(each.configuration.global_batch, []).append(each)
        found = []
        for _, group in sorted(by_batch.items()):
            ranked = sorted(group, key=lambda each: each.step_seconds or math.inf)
            best = ranked[0]
            others = (each for each in ranked if each.configuration.layout != best.configuration.layout)
            runner_up = next(others, None)
            found.append(Fastest(best, runner_up, None if runner_up is None else self._faster(best, runner_up)))
        return found

    def _faster(self, one: Expectation, other: Expectation) -> float:
        """Probability that a step of one is shorter: logarithms count as normal, measured times as independent."""
        gap = math.log((other.step_seconds or 1.0) / (one.step_seconds or 1.0))
        if one.source == other.source == "predicted":
            a, b = one.configuration, other.configuration
            variance = self.covariance(a, a) + self.covariance(b, b) - 2 * self.covariance(a, b)
        else:
            variance = _log_sd(one) ** 2 + _log_sd(other) ** 2
        return 0.5 * (1 + math.erf(gap / math.sqrt(2 * variance))) if variance > 0 else float(gap > 0)

    def by_noise(self, config: PlannerConfig) -> list[NoiseRange]:
        """Which configuration has the highest Goodput at which noise scale, from small to large."""
        # Within a batch Goodput ranks as throughput does, so that the fastest ones are enough.
        able = [each.best for each in self.fastest()]
        if not able:
            return []
        winners = []
        for noise in NOISE_SCALES:
            critical = config.critical_batch_factor * float(noise)
            scores = [
                goodput(each.samples_per_second or 0.0, each.configuration.global_batch, critical, config.objective)
                for each in able
            ]
            winners.append(able[int(np.argmax(scores))])
        starts = [0, *(i for i in range(1, len(winners)) if winners[i] is not winners[i - 1])]
        edges = [0.0, *(float(NOISE_SCALES[i - 1] * NOISE_SCALES[i]) ** 0.5 for i in starts[1:]), math.inf]
        return [NoiseRange(edges[k], edges[k + 1], winners[i]) for k, i in enumerate(starts)]


def _log_sd(each: Expectation) -> float:
    """Half of an 80 % interval is 1.28 standard deviations."""
    if not each.step_seconds or not each.step_seconds_high:
        return 0.0
    return math.log(each.step_seconds_high / each.step_seconds) / 1.2816
