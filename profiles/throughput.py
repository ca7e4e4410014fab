"""How long a step of a configuration takes, from measured rows and from the steps of the job itself."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, Literal, NamedTuple

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from profiles.affine import AffineFit, Point, fit_affine
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Measurement
from profiles.online import Covariance, OnlineCorrection, independent
from profiles.record import Record

OUT_OF_MEMORY = "out of memory"
"""The failure of a `Measurement` for lack of memory."""
FAR = 4
"""A count beyond this many times the largest measured one is called extrapolated."""
SEEN_STEPS = 5
"""Live steps after which a configuration's time is called seen."""
DECILE = 1.2816
"""The 90th percentile of a normal distribution, in standard deviations: what spreads are measured in."""
STEPS_TIMED = 5
"""Steps that a measured time is taken to be the median of: no fewer are timed, and neighbours resemble each other."""
UNKNOWN_ERROR = 1.0
"""Standard error of the logarithm of a time of which nothing is known but a first step."""


class Prediction(Record):
    """What is known about a configuration: a time, or the failure to expect instead."""

    step_seconds: PositiveFloat | None = None
    """Duration of an optimizer step; None for a failure."""
    spread_seconds: NonNegativeFloat | None = None
    """Half-width of its interval (10th to 90th percentile); None for a failure."""
    error: NonNegativeFloat = 0.0
    """Standard error of the logarithm of `step_seconds`: of single steps it is the spread that says how much they
    differ."""
    source: Literal["measured", "interpolated", "extrapolated", "predicted", "seen"]
    """measured: its own rows; interpolated, extrapolated: the line through the rows of its layout and micro-batch;
    predicted: the cost model; seen: the steps of this job."""
    peak_bytes: NonNegativeInt | None = None
    """Largest memory in use on any rank; None where it was not measured."""
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


class Expected(NamedTuple):
    """What stands in for rows that were not measured."""

    predictions: Mapping[Configuration, Prediction] = {}
    """Of configurations."""
    covariance: Covariance = independent
    """Of the logarithms of the errors of two of them."""


class Throughput:
    """Step times of configurations that share one fingerprint (model, software, hardware)."""

    def __init__(self, rows: Iterable[Measurement] = (), expected: Expected | None = None) -> None:
        """`expected` are the configurations that the rows say nothing of."""
        by_configuration: defaultdict[Configuration, list[Measurement]] = defaultdict(list)
        for row in rows:
            by_configuration[row.configuration].append(row)
        self._measured = {configuration: _combine(found) for configuration, found in by_configuration.items()}
        by_group: defaultdict[tuple[Layout, int], dict[int, Prediction]] = defaultdict(dict)
        for configuration, prediction in self._measured.items():
            by_group[_key(configuration)][configuration.num_microbatches] = prediction
        self._groups = {key: _Group.of(by_count) for key, by_count in by_group.items()}
        self._failing: defaultdict[Layout, list[tuple[int, _Group]]] = defaultdict(list)
        for (layout, micro_batch), group in self._groups.items():
            if group.failure:
                self._failing[layout].append((micro_batch, group))
        self._predicted = expected or Expected()
        self._live = OnlineCorrection(shared=self._shared)
        self._before: dict[Configuration, Prediction] = {}
        self._refused: dict[Configuration | Layout, Prediction] = {}

    def predict(self, configuration: Configuration) -> Prediction | None:
        """The duration of a step, or None where nothing is known.

        Its own rows first; else the line through the rows of the same layout and micro-batch (`profiles.affine`), never
        below their smallest number of micro-batches; else what was given as predicted. The steps of the running job
        correct all of it (`profiles.online`).
        """
        refused = self._refusal(configuration)
        if refused:
            return refused
        known = self._before.get(configuration) or self._expected(configuration)
        if known is None or known.step_seconds is None or not self._before:
            return known
        steps = self._live.steps(configuration)
        seconds = known.step_seconds * self._live.factor(configuration)
        error = self._live.error(configuration, known.error)
        seen = steps >= SEEN_STEPS or (steps > 0 and known.error >= UNKNOWN_ERROR)
        if seen:
            spread = DECILE * self._live.noise
        elif known.source == "predicted":
            spread = math.expm1(DECILE * error)
        else:
            spread = (known.spread_seconds or 0.0) / known.step_seconds
        return known.model_copy(
            update={
                "step_seconds": seconds,
                "spread_seconds": spread * seconds,
                "error": error,
                "source": "seen" if seen else known.source,
                "memory_seen": steps > 0 or known.memory_seen,
            }
        )

    def error_beside(self, configuration: Configuration, running: Configuration) -> float:
        """Standard error of the logarithm of the ratio of two times: what slows both down alike is not in it. 0 where
        one is not known."""
        if configuration == running:
            return 0.0
        one, other = (self._before.get(each) or self._expected(each) for each in (configuration, running))
        return self._live.error(configuration, one.error, running, other.error) if one and other else 0.0

    def steps(self, configuration: Configuration) -> int:
        """How many of its steps the running job has timed."""
        return self._live.steps(configuration)

    def observe(self, configuration: Configuration, step_seconds: float) -> None:
        """Feed the duration of an ordinary step of the running job. Raises ValueError unless positive and finite."""
        if not 0 < step_seconds < math.inf:
            raise ValueError(f"step_seconds({step_seconds}) has to be positive and finite")
        before = self._before.get(configuration) or self._expected(configuration)
        if before is None or before.step_seconds is None:
            before = Prediction(
                step_seconds=step_seconds,
                spread_seconds=0.0,
                error=UNKNOWN_ERROR,
                source="seen",
                peak_bytes=before.peak_bytes if before else None,
            )
        assert before.step_seconds is not None
        self._before[configuration] = before
        self._live.observe(configuration, before.step_seconds, step_seconds, before.error)

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
        before = [(each.model_dump(), known.model_dump()) for each, known in self._before.items()]
        refused = [
            ("layout" if isinstance(tried, Layout) else "configuration", tried.model_dump(), why.failure)
            for tried, why in self._refused.items()
        ]
        return {"before": before, "refused": refused, "live": self._live.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        for each, known in state.get("before", ()):
            self._before[Configuration.model_validate(each)] = Prediction.model_validate(known)
        for kind, tried, failure in state.get("refused", ()):
            self.refuse((Layout if kind == "layout" else Configuration).model_validate(tried), failure)
        self._live.restore(state.get("live", {}))

    def counts(self, layout: Layout, micro_batch: int) -> list[int]:
        """Numbers of micro-batches that were measured without failure, ascending."""
        group = self._groups.get((layout, micro_batch))
        return group.counts if group else []

    def _expected(self, configuration: Configuration) -> Prediction | None:
        """Without the steps of the running job."""
        return self._from_table(configuration) or self._predicted.predictions.get(configuration)

    def _shared(self, one: Configuration, other: Configuration) -> float:
        """Covariance of the errors of two predictions: what was measured shares nothing."""
        if self._from_table(one) or self._from_table(other):
            return 0.0
        return self._predicted.covariance(one, other)

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
        seconds, spread = group.line.step_seconds(n), group.line.spread_seconds(n)
        seen = _in_flight(configuration.layout, n) <= _in_flight(configuration.layout, group.counts[-1])
        return Prediction(
            step_seconds=seconds,
            spread_seconds=spread,
            error=spread / seconds / DECILE,
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
            Point(n, prediction.step_seconds, prediction.spread_seconds or 0.0)
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


def _combine(rows: Sequence[Measurement]) -> Prediction:
    """Rows of one configuration as one: the newest decides whether it runs, the median over all steps how fast."""
    newest = max(rows, key=lambda row: row.time)
    if newest.failure is not None:
        return Prediction(source="measured", peak_bytes=newest.peak_bytes, failure=newest.failure)
    timed = [(row.step_seconds, row.spread_seconds or 0.0, max(row.count, 1)) for row in rows if row.step_seconds]
    step_seconds = _median([(seconds, count) for seconds, _, count in timed])
    within = _median([(spread, count) for _, spread, count in timed])
    between = _median([(abs(seconds - step_seconds), count) for seconds, _, count in timed])
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    spread = math.hypot(within, between)
    return Prediction(
        step_seconds=step_seconds,
        spread_seconds=spread,
        error=spread / step_seconds / DECILE / math.sqrt(STEPS_TIMED),
        source="measured",
        peak_bytes=max(peaks, default=None),
        memory_seen=True,
    )


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
