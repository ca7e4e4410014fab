"""How long a step of a configuration takes, from measured rows and from the steps of the job itself."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Any, Literal, NamedTuple

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from profiles.affine import AffineFit, Point, fit_affine
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import OUT_OF_MEMORY, Measurement
from profiles.online import DRIFT, Covariance, OnlineCorrection, independent
from profiles.record import Record

FAR = 4
"""A count beyond this many times the largest measured one is called extrapolated."""
SEEN_STEPS = 5
"""Live steps after which a configuration's time is called seen."""
DECILE = 1.2816
"""The 90th percentile of a normal distribution, in standard deviations: what spreads are measured in."""
POOLED_STEPS = 10
"""Steps of its own that a configuration's noise has to be seen in before it counts more than that of the whole table:
the spread of three steps says next to nothing."""
POOLED_ROWS = 8
"""Likewise for how much repeated measurements differ: repeats that what is expected of a machine is worth."""
ROW_NOISE = 0.02
"""Noise of single steps (standard deviation of the logarithm) to expect before any was measured."""
DRIFT_CHECK_STEPS = 16
"""Live steps after which the table's errors follow the drift that these have shown."""
UNKNOWN_ERROR = 1.0
"""Standard error of the logarithm of a time of which nothing is known but a first step."""


class Prediction(Record):
    """What is known about a configuration: a time, or the failure to expect instead."""

    step_seconds: PositiveFloat | None = None
    """Duration of an optimizer step; None for a failure."""
    error: NonNegativeFloat = 0.0
    """Standard error of the logarithm of `step_seconds`. (How much single steps differ is not in a prediction.)"""
    source: Literal["measured", "interpolated", "extrapolated", "predicted", "seen"]
    """measured: its own rows; interpolated, extrapolated: the line through the rows of its layout and micro-batch;
    predicted: the cost model; seen: the steps of this job."""
    peak_bytes: NonNegativeInt | None = None
    """Largest memory in use on any rank; None if it was not measured."""
    memory_seen: bool = False
    """Whether as much has run as this keeps in memory; else only the memory model can tell whether it fits."""
    failure: str | None = None
    """Why it cannot run: `out of memory`, …"""


def half_spread(seconds: Sequence[float]) -> float:
    """Half the width between the 10th and the 90th percentile: the spread of a `Measurement`. 0 for a single value."""
    if len(seconds) < 2:
        return 0.0
    deciles = quantiles(seconds, n=10, method="inclusive")
    return (deciles[-1] - deciles[0]) / 2


def relative_spread(error: float) -> float:
    """The ± that is shown: from the median to the upper end of an 80 % interval, as a share, for this standard error
    of a logarithm."""
    return math.expm1(min(DECILE * error, 700.0))


class CostPredictions(NamedTuple):
    """Predictions of a cost model, which stand in for rows that were not measured."""

    predictions: Mapping[Configuration, Prediction] = {}
    """Configuration → its prediction."""
    covariance: Covariance = independent
    """Covariance of the logarithms of the errors of two predictions."""


class Throughput:
    """Step times of configurations that share one fingerprint (model, software, hardware)."""

    def __init__(self, rows: Iterable[Measurement] = (), unmeasured: CostPredictions | None = None) -> None:
        """`unmeasured` are predictions of configurations that the rows say nothing of."""
        by_configuration: defaultdict[Configuration, list[Measurement]] = defaultdict(list)
        for row in rows:
            by_configuration[row.configuration].append(row)
        self._rows = dict(by_configuration)
        self._noise, drift = _noise_and_drift(self._rows.values())
        self._live = OnlineCorrection(shared=self._shared, drift=drift)
        self._unmeasured = unmeasured or CostPredictions()
        self._before: dict[Configuration, Prediction] = {}
        self._refused: dict[Configuration | Layout, Prediction] = {}
        self._drift_checks = 0
        self._tabulate(drift)

    def _tabulate(self, drift: float) -> None:
        """Combine the rows, where `drift` is what the machine differs by from one measurement to another."""
        self._drift = drift
        self._measured = {c: _combine(rows, self._noise, drift) for c, rows in self._rows.items()}
        by_group: defaultdict[tuple[Layout, int], dict[int, Prediction]] = defaultdict(dict)
        for configuration, prediction in self._measured.items():
            by_group[_key(configuration)][configuration.num_microbatches] = prediction
        self._groups = {key: _Group.of(by_count) for key, by_count in by_group.items()}
        self._failing: defaultdict[Layout, list[tuple[int, _Group]]] = defaultdict(list)
        for (layout, micro_batch), group in self._groups.items():
            if group.failure:
                self._failing[layout].append((micro_batch, group))

    def predict(self, configuration: Configuration) -> Prediction | None:
        """The duration of a step, or None if nothing is known.

        Its own rows first; else the line through the rows of the same layout and micro-batch (`profiles.affine`), never
        below their smallest number of micro-batches; else what was given as predicted. The steps of the running job
        correct all of it (`profiles.online`).
        """
        refused = self._refusal(configuration)
        if refused:
            return refused
        prediction = self._known(configuration)
        if prediction is None or prediction.step_seconds is None or not self._before:
            return prediction
        steps = self._live.steps(configuration)
        seen = steps >= SEEN_STEPS or (steps > 0 and prediction.error >= UNKNOWN_ERROR)
        return prediction.model_copy(
            update={
                "step_seconds": prediction.step_seconds * self._live.factor(configuration),
                "error": self._live.error(configuration, prediction.error),
                "source": "seen" if seen else prediction.source,
                "memory_seen": steps > 0 or prediction.memory_seen,
            }
        )

    def error_beside(self, configuration: Configuration, running: Configuration) -> float:
        """Standard error of the logarithm of the ratio of two times: what slows both down alike is not in it. 0 if one
        is not known."""
        if configuration == running:
            return 0.0
        one, other = self._known(configuration), self._known(running)
        return self._live.error(configuration, one.error, running, other.error) if one and other else 0.0

    def steps(self, configuration: Configuration) -> int:
        """How many of its steps the running job has timed."""
        return self._live.steps(configuration)

    def observe(self, configuration: Configuration, step_seconds: float) -> None:
        """Feed the duration of an ordinary step of the running job. Raises ValueError unless positive and finite."""
        if not 0 < step_seconds < math.inf:
            raise ValueError(f"step_seconds({step_seconds}) has to be positive and finite")
        before = self._expect(configuration, step_seconds)
        assert before.step_seconds is not None
        self._live.observe(configuration, before.step_seconds, step_seconds, before.error)
        self._follow_drift()

    def observe_comparison(
        self, candidate: Configuration, running: Configuration, log_ratio: float, error: float
    ) -> None:
        """Feed what a trial measured: the logarithm of the candidate's step time ÷ that of the running configuration,
        timed just before and after, with its standard error. Neither the machine's drift nor a slow episode is in it.

        The candidate counts as seen. Raises ValueError unless the ratio is finite and the error positive and finite.
        """
        other = self._known(running)
        base = other.step_seconds if other and other.step_seconds else 1.0
        if not math.isfinite(log_ratio):
            raise ValueError(f"log_ratio({log_ratio}) has to be finite")
        pair = self._expect(candidate, base * math.exp(log_ratio)), self._expect(running, base)
        assert pair[0].step_seconds is not None
        assert pair[1].step_seconds is not None
        off = log_ratio - math.log(pair[0].step_seconds / pair[1].step_seconds)
        self._live.observe_comparison(candidate, running, off, error, (pair[0].error, pair[1].error), SEEN_STEPS)
        self._follow_drift()

    def _expect(self, configuration: Configuration, seen_seconds: float) -> Prediction:
        """The prediction that what is seen of a configuration is compared with, the same for all that follows; of one
        that nothing was known of, what is seen first."""
        before = self._known(configuration)
        if before is None or before.step_seconds is None:
            peak_bytes = before.peak_bytes if before else None
            before = Prediction(step_seconds=seen_seconds, error=UNKNOWN_ERROR, source="seen", peak_bytes=peak_bytes)
        self._before.setdefault(configuration, before)
        return before

    def _follow_drift(self) -> None:
        """Trust the table as little as the machine has been seen to drift."""
        self._drift_checks += 1
        if self._drift_checks % DRIFT_CHECK_STEPS:
            return
        drift = self._live.drift
        if not 0.8 < drift / self._drift < 1.25:
            self._tabulate(drift)

    def refuse(self, tried: Configuration | Layout, failure: str) -> None:
        """Predict this failure from now on: the running job tried the configuration, or anything in the layout.

        Of a configuration that ran out of memory, more or larger micro-batches are refused too, unless they ran.
        """
        self._refused[tried] = Prediction(source="seen", failure=failure)

    def _refusal(self, configuration: Configuration) -> Prediction | None:
        exact = self._refused.get(configuration) or self._refused.get(configuration.layout)
        if exact or configuration in self._before:
            return exact
        for tried, refused in self._refused.items():
            if isinstance(tried, Layout) or refused.failure != OUT_OF_MEMORY or tried.layout != configuration.layout:
                continue
            if tried.micro_batch <= configuration.micro_batch and tried.global_batch <= configuration.global_batch:
                return refused
        return None

    def state(self) -> dict[str, Any]:
        """What the running job taught, as plain values for a checkpoint."""
        before = [
            (configuration.model_dump(), prediction.model_dump()) for configuration, prediction in self._before.items()
        ]
        refused = [
            ("layout" if isinstance(tried, Layout) else "configuration", tried.model_dump(), why.failure)
            for tried, why in self._refused.items()
        ]
        return {"before": before, "refused": refused, "live": self._live.state(), "drift": self._drift}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        for configuration, prediction in state.get("before", ()):
            self._before[Configuration.model_validate(configuration)] = Prediction.model_validate(prediction)
        for kind, tried, failure in state.get("refused", ()):
            self.refuse((Layout if kind == "layout" else Configuration).model_validate(tried), failure)
        self._live.restore(state.get("live", {}))
        self._tabulate(state.get("drift", self._drift))

    def counts(self, layout: Layout, micro_batch: int) -> list[int]:
        """Numbers of micro-batches that were measured without failure, ascending."""
        group = self._groups.get((layout, micro_batch))
        return group.counts if group else []

    def _known(self, configuration: Configuration) -> Prediction | None:
        """Without the steps of the running job: the time that they are compared with, and its present error."""
        present = self._from_table(configuration) or self._unmeasured.predictions.get(configuration)
        before = self._before.get(configuration)
        if before is None or present is None or present.source != before.source or not present.step_seconds:
            return before or present
        return before.model_copy(update={"error": present.error})

    def _shared(self, one: Configuration, other: Configuration) -> float:
        """Covariance of the errors of two predictions: what was measured shares nothing."""
        if self._from_table(one) or self._from_table(other):
            return 0.0
        return self._unmeasured.covariance(one, other)

    def _from_table(self, configuration: Configuration) -> Prediction | None:
        own = self._measured.get(configuration)
        group = self._groups.get(_key(configuration))
        if own:
            return own
        n = configuration.num_microbatches
        if group and group.failure and n >= group.fails_from:
            return group.failure
        if group is None or group.line is None or n < group.counts[0]:
            return None if group and group.counts else self._failure_of_smaller(configuration)
        seconds = group.line.step_seconds(n)
        seen = _in_flight(configuration.layout, n) <= _in_flight(configuration.layout, group.counts[-1])
        return Prediction(
            step_seconds=seconds,
            error=group.line.error_seconds(n) / seconds,
            source="interpolated" if n <= FAR * group.counts[-1] else "extrapolated",
            peak_bytes=group.peak_bytes if seen else None,
            memory_seen=seen,
        )

    def _failure_of_smaller(self, configuration: Configuration) -> Prediction | None:
        """The failure of a smaller micro-batch in the same layout, on no more sequences: a larger one takes no less
        memory."""
        sequences = configuration.micro_batch * configuration.num_microbatches
        for micro_batch, group in self._failing[configuration.layout]:
            if micro_batch < configuration.micro_batch and micro_batch * group.fails_from <= sequences:
                return group.failure
        return None


@dataclass
class _Group:
    """Rows of one layout and micro-batch. They differ in the number of micro-batches alone."""

    counts: list[int]
    line: AffineFit | None
    peak_bytes: int | None
    fails_from: int
    failure: Prediction | None

    @classmethod
    def of(cls, by_count: dict[int, Prediction]) -> "_Group":
        points = [
            Point(n, prediction.step_seconds, prediction.step_seconds * prediction.error)
            for n, prediction in sorted(by_count.items())
            if prediction.step_seconds is not None
        ]
        counts = [point.num_microbatches for point in points]
        # More micro-batches never take less memory: a failure holds for every larger count, unless a larger one ran.
        fails_from = min((n for n, p in by_count.items() if p.failure and n > max(counts, default=0)), default=0)
        return cls(
            counts=counts,
            line=fit_affine(points) if len(points) > 1 else None,
            peak_bytes=max((p.peak_bytes for p in by_count.values() if p.peak_bytes is not None), default=None),
            fails_from=fails_from,
            failure=by_count[fails_from] if fails_from else None,
        )


def _key(configuration: Configuration) -> tuple[Layout, int]:
    return configuration.layout, configuration.micro_batch


def _in_flight(layout: Layout, num_microbatches: int) -> int:
    """Micro-batches whose activations the first stage holds at once: 1F1B fills the pipeline, the interleaved schedule
    (vp) has less than twice as many."""
    return min(num_microbatches, layout.pp * (2 if layout.vp > 1 else 1))


def _combine(rows: Sequence[Measurement], noise: float, drift: float) -> Prediction:
    """Rows of one configuration as one: the newest decides whether it runs, the median over all steps how fast.

    `noise` and `drift` are the table's (`_noise_and_drift`). The median of n steps has π/2 of the variance of their
    mean; what the machine was like at a measurement is in all of its steps, and differs from row to row.
    """
    newest = max(rows, key=lambda row: row.time)
    if newest.failure is not None:
        return Prediction(source="measured", peak_bytes=newest.peak_bytes, failure=newest.failure)
    timed = [row for row in rows if row.step_seconds]
    step_seconds = _median([(row.step_seconds or 0.0, max(row.count, 1)) for row in timed])
    within, between = _Pool(noise, POOLED_STEPS), _Pool(drift, POOLED_ROWS)
    for row in timed:
        within.add_spread(row)
    between.add_differences(timed)
    steps = sum(max(row.count, 1) for row in timed)
    return Prediction(
        step_seconds=step_seconds,
        error=math.sqrt(math.pi / 2 * within.variance / steps + between.variance / len(timed)),
        source="measured",
        peak_bytes=max((row.peak_bytes for row in rows if row.peak_bytes is not None), default=None),
        memory_seen=True,
    )


class _Pool:
    """A variance that is known roughly, and better from what is added."""

    def __init__(self, expected: float, weight: float) -> None:
        """A standard deviation, and how many observations it is worth."""
        self._sum, self._weight = weight * expected**2, weight

    def add_spread(self, row: Measurement) -> None:
        """The noise of single steps in a measurement, as a logarithm."""
        if row.step_seconds and row.spread_seconds is not None and row.count > 1:
            self._sum += (row.count - 1) * (row.spread_seconds / row.step_seconds / DECILE) ** 2
            self._weight += row.count - 1

    def add_differences(self, rows: Sequence[Measurement]) -> None:
        """How repeated measurements of one configuration differ, as logarithms."""
        logs = [math.log(row.step_seconds) for row in rows if row.step_seconds]
        if len(logs) > 1:
            self._sum += sum((log - fmean(logs)) ** 2 for log in logs)
            self._weight += len(logs) - 1

    @property
    def variance(self) -> float:
        """As far as it is known."""
        return self._sum / self._weight


def measurement_error(rows: Iterable[Measurement]) -> float:
    """Standard deviation, as a logarithm, of what a measured time of these rows is off by: of a median of so many
    steps, at one moment of the machine."""
    by_configuration: defaultdict[Configuration, list[Measurement]] = defaultdict(list)
    for row in rows:
        by_configuration[row.configuration].append(row)
    noise, drift = _noise_and_drift(by_configuration.values())
    counts = [row.count for group in by_configuration.values() for row in group if row.count]
    return math.sqrt(math.pi / 2 * noise**2 / (median(counts) if counts else 1) + drift**2)


def _noise_and_drift(table: Collection[Sequence[Measurement]]) -> tuple[float, float]:
    """Standard deviations, as logarithms, of single steps in a measurement and of measurements of one configuration;
    each entry of `table` has the rows of one."""
    noise, drift = _Pool(ROW_NOISE, POOLED_STEPS), _Pool(DRIFT, POOLED_ROWS)
    for rows in table:
        for row in rows:
            noise.add_spread(row)
        drift.add_differences(rows)
    return math.sqrt(noise.variance), math.sqrt(drift.variance)


def _median(weighted: list[tuple[float, int]]) -> float:
    """Weighted median of (value, weight): as if every value stood there `weight` times."""
    half = sum(weight for _, weight in weighted) / 2
    ordered = sorted(weighted)
    below = 0
    for index, (value, weight) in enumerate(ordered):
        below += weight
        if below > half:
            return value
        if below == half:
            return (value + ordered[index + 1][0]) / 2
    raise AssertionError("a median of nothing")
