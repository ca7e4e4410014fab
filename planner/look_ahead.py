"""Makes prospects: asks the throughput table, the cost model and the memory model about every candidate."""

import math
from collections.abc import Iterable, Iterator, Sequence

from planner.as_run import predict_as_run
from planner.config import PlannerConfig
from planner.memory_check import LIKELY, in_words, memory_bytes
from planner.prospects import Expectation, Prospects
from planner.sampling import halved_share
from planner.space import candidates, noise_measurable
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import RECOMPUTE, Configurations
from profiles.cost import CostModel, Timings, expected
from profiles.hardware import is_hardware_of
from profiles.measurement import OWN, Measurement
from profiles.memory import MEGATRON, Implementation, MemoryModel, Peaks
from profiles.memory.peaks import OUT_OF_MEMORY
from profiles.mfu import peak_samples_per_second
from profiles.model_shape import ModelShape
from profiles.throughput import DECILE, Prediction, Throughput

LARGEST_ZERO = 1
"""The largest ZeRO stage that the backend does."""
HALVED = "a lone micro-batch is timed as the job runs it: some or all steps in two halves, for their noise"
"""What `as_run` assumes of times."""


def look_ahead(
    config: PlannerConfig,
    model: ModelShape,
    cluster: Cluster,
    precision: str,
    start: Configuration,
    table: Iterable[Measurement] = (),
    how: Implementation = MEGATRON,
) -> Prospects:
    """Expect something of every candidate: from the table's rows of this job where they reach, else from the models,
    which learn from them, and from shards that one accelerator ran alone.

    Raises ValueError for an accelerator that nothing is known about.
    """
    rows = rows_of(table, model, cluster, precision)
    steps = [row for row in rows if not row.shard]
    cost = CostModel().fit(Timings.of(rows, cluster))
    room, peak_samples = memory_bytes(cluster), peak_samples_per_second(model, cluster, precision)
    memory = MemoryModel(how).fit(Peaks.of(rows, room))
    space = candidates(config, model, cluster, start)
    variants = list(_variants(model, start))
    everything = [*space, *variants]
    arrays = Configurations.of(everything)
    halves = [each.halved for each in everything if halved_share(config, each) > 0]
    predicted = expected(cost, model, cluster, precision, list(dict.fromkeys([*everything, *halves])), rows)
    throughput = Throughput(steps, predicted)
    peaks = memory.predict(model, arrays, precision)
    chances = None if room is None else peaks.chance_to_fit(room)
    found = []
    for index, candidate in enumerate(everything):
        known = predict_as_run(throughput, config, candidate)
        assert known is not None, "what the table lacks is predicted"
        chance = _chance(known, None if chances is None else float(chances[index]))
        seconds, fast, slow = _interval(known)
        peak, low, high = (float(each[index]) for each in (peaks.peak_bytes, peaks.low, peaks.high))
        if known.peak_bytes is not None:
            peak = low = high = float(known.peak_bytes)
        found.append(
            Expectation(
                candidate,
                step_seconds=seconds,
                step_seconds_low=fast,
                step_seconds_high=slow,
                source=known.source,
                peak_bytes=peak,
                peak_bytes_low=low,
                peak_bytes_high=high,
                memory={name: float(part[index]) for name, part in peaks.breakdown.items()},
                last_stage=bool(peaks.last_stage[index]),
                chance_to_fit=chance,
                refusal=_refusal(config, candidate, known, chance),
                peak_samples_per_second=peak_samples,
            )
        )
    return Prospects(
        expectations=found[: len(space)],
        start=next(each for each in found if each.configuration == start),
        variants=found[len(space) :],
        memory_bytes=room,
        fingerprint=rows[0].fingerprint if rows else None,
        measured_rows=len(steps),
        measured_shards=len(rows) - len(steps),
        assumptions=(*cost.assumptions(model, cluster), *peaks.assumptions, *([HALVED] if halves else [])),
        covariance=predicted.covariance,
    )


def rows_of(table: Iterable[Measurement], model: ModelShape, cluster: Cluster, precision: str) -> list[Measurement]:
    """The rows that were measured for this model and precision on a cluster like this, with the software that was used
    last; imported rows only where there are no others. Nothing here can ask the hardware what it is."""
    mine = [
        row
        for row in table
        if (row.fingerprint.model, row.fingerprint.precision) == (model.digest, precision)
        and is_hardware_of(row.fingerprint.hardware, cluster)
    ]
    if not mine:
        return []
    newest = max(mine, key=lambda row: (row.fingerprint.backend.startswith(OWN), row.time)).fingerprint
    return [row for row in mine if row.fingerprint == newest]


def _variants(model: ModelShape, start: Configuration) -> Iterator[Configuration]:
    """The starting configuration with other settings that cost time and save memory, or the other way round."""
    layout = start.layout
    split = [False, True] if layout.tp > 1 and model.seq_len % layout.tp == 0 else [layout.sequence_parallel]
    stages: Sequence[int] = range(LARGEST_ZERO + 1) if layout.dp * layout.cp > 1 else [layout.zero]
    for zero in stages:
        for sequence_parallel in split:
            for recompute in RECOMPUTE:
                changes = {"recompute": recompute, "zero": zero, "sequence_parallel": sequence_parallel}
                yield start.model_copy(update={"layout": layout.model_copy(update=changes)})


def _interval(known: Prediction) -> tuple[float | None, float | None, float | None]:
    """Duration and its interval; nothing of a failure."""
    seconds, spread = known.step_seconds, known.spread_seconds or 0.0
    if seconds is None:
        return None, None, None
    low = seconds * math.exp(-DECILE * known.error) if known.source == "predicted" else max(seconds - spread, 0.0)
    return seconds, low, seconds + spread


def _chance(known: Prediction, predicted: float | None) -> float | None:
    """Probability to fit: 1 for what ran, 0 for what ran out of memory; None where memory is not checked."""
    if predicted is None:
        return None
    if known.failure:
        return 0.0 if known.failure == OUT_OF_MEMORY else predicted
    return 1.0 if known.memory_seen else predicted


def _refusal(config: PlannerConfig, candidate: Configuration, known: Prediction, chance: float | None) -> str:
    if known.failure:
        return known.failure
    if chance is not None and chance < LIKELY:
        return in_words(chance)
    return "" if noise_measurable(candidate, config.noise_source) else "noise cannot be measured: one part a step"
