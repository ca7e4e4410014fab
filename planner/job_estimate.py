"""Everything that is expected of a job before it is launched: `copus plan` shows it, `copus simulate` uses it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planner.backend_traits import ANY_BACKEND, BackendTraits
from planner.config import PlannerConfig
from planner.goodput import goodput
from planner.predictor import CandidateEstimate, Predictor
from profiles.accelerator import accelerator
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import RECOMPUTE
from profiles.hardware import is_hardware_of
from profiles.measurement import Fingerprint, Measurement
from profiles.memory import MEGATRON, Implementation
from profiles.model_shape import ModelShape

NOISE_SCALES = 2.0 ** np.arange(-2, 24.01, 0.25)
"""Noise scales that the best configuration is looked up for, sequences."""


@dataclass(frozen=True)
class Fastest:
    """The fastest configuration of one global batch."""

    best: CandidateEstimate
    """The configuration."""
    runner_up: CandidateEstimate | None
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
    best: CandidateEstimate
    """Highest Goodput throughout."""


@dataclass(frozen=True)
class JobEstimate:
    """Everything that is expected of a job."""

    predictor: Predictor
    """Whose estimates these are."""
    candidates: list[CandidateEstimate]
    """Every candidate, in the planner's order."""
    start: CandidateEstimate
    """The configuration that the job starts with."""
    variants: list[CandidateEstimate]
    """The same with every recomputation and ZeRO stage, and with split sequences if tp > 1."""
    fingerprint: Fingerprint | None
    """Whose measured rows were used; None if there are none."""
    measured_rows: int
    """How many steps were measured."""
    measured_shards: int
    """How many shards one accelerator ran alone."""

    @property
    def memory_bytes(self) -> float | None:
        """Memory of one accelerator; None if memory is not checked."""
        return self.predictor.memory.memory_bytes

    @property
    def eligible(self) -> list[CandidateEstimate]:
        """Candidates that may be chosen."""
        return [
            candidate for candidate in self.candidates if not candidate.refusal and candidate.step_seconds is not None
        ]

    @property
    def smallest(self) -> CandidateEstimate:
        """The candidate that needs the least memory."""
        return min(self.candidates, key=lambda candidate: candidate.peak.expected_bytes)

    def fastest(self) -> list[Fastest]:
        """For each global batch, ascending; batches at which nothing may be chosen are left out."""
        by_batch: dict[int, list[CandidateEstimate]] = {}
        for candidate in self.eligible:
            by_batch.setdefault(candidate.configuration.global_batch, []).append(candidate)
        fastest = []
        for _, group in sorted(by_batch.items()):
            ranked = sorted(group, key=lambda candidate: candidate.step_seconds or math.inf)
            best = ranked[0]
            others = (candidate for candidate in ranked if candidate.configuration.layout != best.configuration.layout)
            runner_up = next(others, None)
            fastest.append(Fastest(best, runner_up, None if runner_up is None else self._faster(best, runner_up)))
        return fastest

    def _faster(self, one: CandidateEstimate, other: CandidateEstimate) -> float:
        """Probability that a step of one is shorter; logarithms count as normal."""
        gap = math.log((other.step_seconds or 1.0) / (one.step_seconds or 1.0))
        error = self.predictor.estimate(one.configuration, beside=other.configuration).error
        return 0.5 * (1 + math.erf(gap / math.sqrt(2) / error)) if error > 0 else float(gap > 0)

    def by_noise(self, config: PlannerConfig) -> list[NoiseRange]:
        """Which configuration has the highest Goodput at which noise scale, from small to large."""
        # Within a batch Goodput ranks as throughput does, so that the fastest ones are enough.
        able = [fastest.best for fastest in self.fastest()]
        if not able:
            return []
        winners = []
        for noise in NOISE_SCALES:
            critical = config.critical_batch_factor * float(noise)
            scores = [
                goodput(
                    candidate.samples_per_second or 0.0,
                    candidate.configuration.global_batch,
                    critical,
                    config.objective,
                )
                for candidate in able
            ]
            winners.append(able[int(np.argmax(scores))])
        starts = [0, *(i for i in range(1, len(winners)) if winners[i] is not winners[i - 1])]
        edges = [0.0, *(float(NOISE_SCALES[i - 1] * NOISE_SCALES[i]) ** 0.5 for i in starts[1:]), math.inf]
        return [NoiseRange(edges[k], edges[k + 1], winners[i]) for k, i in enumerate(starts)]


def estimate_job(
    config: PlannerConfig,
    model: ModelShape,
    cluster: Cluster,
    precision: str,
    start: Configuration,
    table: Iterable[Measurement] = (),
    implementation: Implementation = MEGATRON,
    backend: BackendTraits = ANY_BACKEND,
) -> JobEstimate:
    """Estimate every candidate from the table's rows of this job and from the models that learn from them.

    Raises ValueError for an accelerator that nothing is known about.
    """
    accelerator(cluster.accelerator).peak(precision)
    rows = rows_of(table, model, cluster, precision, backend)
    variants = list(_variants(model, start, backend, precision))
    predictor = Predictor.from_rows(
        config, model, cluster, precision, start, rows, implementation, backend=backend, besides=variants
    )
    steps = sum(not row.shard for row in rows)
    return JobEstimate(
        predictor=predictor,
        candidates=[predictor.estimate(configuration) for configuration in predictor.candidates],
        start=predictor.estimate(start),
        variants=[predictor.estimate(configuration) for configuration in variants],
        fingerprint=rows[0].fingerprint if rows else None,
        measured_rows=steps,
        measured_shards=len(rows) - steps,
    )


def rows_of(
    table: Iterable[Measurement],
    model: ModelShape,
    cluster: Cluster,
    precision: str,
    backend: BackendTraits = ANY_BACKEND,
) -> list[Measurement]:
    """The rows of this model and precision on a cluster like this, with the software that was used last; rows of
    another framework, which were imported, only if there are no others. Nothing here can ask the hardware what it is.
    """
    mine = [
        row
        for row in table
        if (row.fingerprint.model, row.fingerprint.precision) == (model.digest, precision)
        and is_hardware_of(row.fingerprint.hardware, cluster)
    ]
    if not mine:
        return []

    def preference(row: Measurement) -> tuple[bool, float]:
        return row.fingerprint.backend.partition(" ")[0] == backend.framework, row.time

    newest = max(mine, key=preference).fingerprint
    return [row for row in mine if row.fingerprint == newest]


def _variants(
    model: ModelShape, start: Configuration, backend: BackendTraits, precision: str
) -> Iterator[Configuration]:
    """The starting configuration with other settings that trade time for memory."""
    layout = start.layout
    split = [False, True] if layout.tp > 1 and model.seq_len % layout.tp == 0 else [layout.sequence_parallel]
    stages: Sequence[int] = range(backend.largest_zero + 1) if layout.dp * layout.cp > 1 else [layout.zero]
    for zero in stages:
        for sequence_parallel in split:
            for recompute in RECOMPUTE:
                changes = {"recompute": recompute, "zero": zero, "sequence_parallel": sequence_parallel}
                changes |= {} if zero else {"dp_replicate": 1}  # nothing is shared out, so there are no copies of it
                variant = start.model_copy(update={"layout": layout.model_copy(update=changes)})
                if backend.runs(variant, precision):
                    yield variant
