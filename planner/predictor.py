"""How fast a configuration is, how much memory it takes, and whether it may be chosen: the one place that says so."""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from planner.backend_traits import ANY_BACKEND, BackendTraits
from planner.config import PlannerConfig
from planner.memory_check import LIKELY, MemoryCheck, PeakMemory
from planner.move_costs import expected_layout_seconds
from planner.policies.policy import make_policy
from planner.pruning import worthwhile
from planner.sampling import halved_share, measured_configuration, noise_measurable, typical_configuration
from planner.space import candidates
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.cost import CostModel, Timings, predict_unmeasured
from profiles.cost.residual import Smoothness
from profiles.formatting import duration, percent
from profiles.measurement import OUT_OF_MEMORY, Measurement
from profiles.memory import MEGATRON, Implementation
from profiles.mfu import peak_samples_per_second
from profiles.model_shape import ModelShape
from profiles.throughput import DECILE, CostPredictions, Prediction, Throughput, measurement_error, relative_spread

MAX_RELATIVE_SPREAD = 0.5
"""A time whose interval is wider than this share of it is no reason to move: the best of many guesses is a bad one. A
policy that weighs errors decides for itself, as it may try the configuration, unless the time is read off a line
through few rows, which is wrong in ways that its error does not say."""


@dataclass(frozen=True)
class CandidateEstimate:
    """What is expected of one configuration. Intervals hold 80 %: from the 10th to the 90th percentile."""

    configuration: Configuration
    """The candidate."""
    step_seconds: float | None
    """Mean duration of its steps as the job runs them; None if it fails or nothing is known."""
    error: float
    """Standard error of the logarithm of `step_seconds`, or of its ratio to that of the running configuration, if one
    was named: what slows both down alike is not in it."""
    source: str
    """measured, interpolated, extrapolated: the throughput table. predicted: the cost model. seen: steps of this job.
    none: nothing is known."""
    peak: PeakMemory
    """Memory of the fullest rank, as measured or else as the memory model expects."""
    refusal: str
    """Why it may not be chosen; empty if it may."""
    can_run: bool
    """Whether it neither failed nor is too large for the memory: a policy that needs no throughput may choose it."""
    peak_samples_per_second: float | None
    """Throughput at the accelerators' rated peak; None if no data sheet says it."""

    @property
    def samples_per_second(self) -> float | None:
        """Throughput, sequences a second."""
        return None if self.step_seconds is None else self.configuration.global_batch / self.step_seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization, 0 to 1; None if the peak is not rated or the configuration fails."""
        speed, peak = self.samples_per_second, self.peak_samples_per_second
        return None if speed is None or peak is None else speed / peak

    @property
    def step_seconds_low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.step_seconds is None else self.step_seconds * math.exp(-DECILE * self.error)

    @property
    def step_seconds_high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.step_seconds is None else self.step_seconds * math.exp(DECILE * self.error)

    @property
    def spread_seconds(self) -> float | None:
        """From `step_seconds` to the upper end: the ± that is shown."""
        return None if self.step_seconds is None else self.step_seconds * relative_spread(self.error)


class Predictor:
    """Measured rows, cost model, memory model and the steps of the running job, put together for one job.

    The live planner, `copus plan`, `copus simulate` and profiling all ask this class, so that they agree on how fast a
    configuration is and on whether it may be chosen.
    """

    def __init__(
        self,
        config: PlannerConfig,
        model: ModelShape,
        cluster: Cluster,
        precision: str,
        start: Configuration,
        throughput: Throughput,
        memory: MemoryCheck | None = None,
        cost: CostModel | None = None,
        space: list[Configuration] | None = None,
        backend: BackendTraits = ANY_BACKEND,
    ) -> None:
        """From its parts, which `from_rows` makes. Without `memory` the memory model has learned from nothing, and
        without `space` every configuration that the job file and the backend allow is a candidate."""
        self.config = config
        self.backend = backend
        """What trains."""
        self.model = model
        self.cluster = cluster
        self.precision = precision
        self.start = start
        """The configuration of the job file."""
        self.throughput = throughput
        """Step times: what the running job sees goes into it (`observe`, `refuse`)."""
        self.memory = memory or MemoryCheck(model, cluster, precision)
        """Peaks, and the memory that there is."""
        self.candidates = candidates(config, model, cluster, start, backend, precision) if space is None else space
        """The configurations that may be worth choosing, in a fixed order, `start` always among them."""
        self.cost = cost
        """The cost model, fitted to the rows; None if it knows nothing of the accelerator, or is not to be used."""
        self._weighs_error = make_policy(config).weighs_error
        self._peak_samples_per_second = peak_samples_per_second(model, cluster, precision)
        self.memory.peaks(self.candidates)  # all at once is a hundred times faster than one by one

    @classmethod
    def from_rows(
        cls,
        config: PlannerConfig,
        model: ModelShape,
        cluster: Cluster,
        precision: str,
        start: Configuration,
        rows: Iterable[Measurement] = (),
        implementation: Implementation = MEGATRON,
        *,
        backend: BackendTraits = ANY_BACKEND,
        use_cost_model: bool = True,
        besides: Sequence[Configuration] = (),
    ) -> "Predictor":
        """Fit everything to rows of one fingerprint; shards that one accelerator ran alone may be among them.

        `use_cost_model=False` leaves unmeasured configurations unknown, and so does an accelerator without a file.
        `besides` are configurations that will be asked about and are no candidates.
        """
        rows = list(rows)
        space = worthwhile(config, model, cluster, precision, start, implementation, backend)
        asked = [*space, *besides]
        halves = [configuration.halved for configuration in asked if halved_share(config, backend, configuration) > 0]
        predicted, cost = CostPredictions(), None
        if use_cost_model:
            with contextlib.suppress(ValueError):  # an accelerator or a precision that nothing is known about
                smoothness = Smoothness(noise_sd=measurement_error(rows))
                cost = CostModel(
                    smoothness,
                    optimizer=implementation.optimizer,
                    stack=implementation.stack,
                    context=implementation.context,
                    dispatch=implementation.expert_dispatch,
                )
                cost = cost.fit(Timings.of(rows, cluster))
                everything = list(dict.fromkeys([*asked, *halves]))
                predicted = predict_unmeasured(cost, model, cluster, precision, everything, rows)
        throughput = Throughput((row for row in rows if not row.shard), predicted)
        measured = partial(measured_configuration, config, backend)
        memory = MemoryCheck(model, cluster, precision, rows, implementation, measured)
        return cls(config, model, cluster, precision, start, throughput, memory, cost, space, backend)

    @property
    def layout_move_seconds(self) -> float:
        """What a move to another layout is expected to take, as the job file says or else by the size of the model."""
        given = self.config.layout_move_seconds
        if given is not None:
            return given
        return expected_layout_seconds(self.model, self.cluster, self.start.layout, self.precision)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the predictions take for granted, in words."""
        assumptions = [
            *(self.cost.assumptions(self.model, self.cluster) if self.cost else ()),
            *self.memory.assumptions,
        ]
        if any(halved_share(self.config, self.backend, candidate) for candidate in self.candidates):
            assumptions.append("a lone micro-batch is timed as the job runs it: some or all steps in two halves")
        return tuple(assumptions)

    def estimate(self, configuration: Configuration, beside: Configuration | None = None) -> CandidateEstimate:
        """What is expected of a configuration. `beside` is the running one: then the error is that of the comparison
        with it, which is what a decision between the two needs."""
        prediction = self.step_time(configuration)
        error = prediction.error if prediction else 0.0
        if prediction and beside is not None and beside != configuration:
            error = self.throughput.error_beside(self.typical(configuration), self.typical(beside))
        peak = _with_measured(self.memory.peaks([configuration])[0], prediction)
        return CandidateEstimate(
            configuration=configuration,
            step_seconds=prediction.step_seconds if prediction else None,
            error=error,
            source=prediction.source if prediction else "none",
            peak=peak,
            refusal=self._failure(prediction, peak) or self._refusal(configuration, prediction, error),
            can_run=not self._failure(prediction, peak),
            peak_samples_per_second=self._peak_samples_per_second,
        )

    def step_time(self, configuration: Configuration) -> Prediction | None:
        """The mean duration of its steps, those that are halved to measure their noise included; None if nothing is
        known. Nothing known of the halves leaves what `Throughput.predict` says."""
        whole, share = self.throughput.predict(configuration), halved_share(self.config, self.backend, configuration)
        if not share or whole is None or whole.step_seconds is None:
            return whole
        halves = self.throughput.predict(configuration.halved)
        if halves is None or halves.step_seconds is None:
            return whole
        typical = halves if share > 0.5 else whole
        seconds = (1 - share) * whole.step_seconds + share * halves.step_seconds
        seen = whole.memory_seen or (share == 1 and halves.memory_seen)  # then it never runs as a whole
        update = {"step_seconds": seconds, "peak_bytes": whole.peak_bytes, "memory_seen": seen}
        return typical.model_copy(update=update)

    def steps_seen(self, configuration: Configuration) -> int:
        """How many of its steps the running job has timed."""
        return self.throughput.steps(self.typical(configuration))

    def noise_measurable(self, configuration: Configuration) -> bool:
        """Whether the noise scale can be measured while it runs."""
        return noise_measurable(self.config, self.backend, configuration)

    def typical(self, configuration: Configuration) -> Configuration:
        """The configuration that most of its steps execute, and are timed as."""
        return typical_configuration(self.config, self.backend, configuration)

    def _failure(self, prediction: Prediction | None, peak: PeakMemory) -> str:
        """Why it cannot run; empty if it can."""
        if prediction and prediction.failure:
            return prediction.failure
        return self.memory.refusal(peak, LIKELY)

    def _refusal(self, configuration: Configuration, prediction: Prediction | None, error: float) -> str:
        """Why it may not be chosen although it can run, whatever the noise scale; empty if it may."""
        if prediction is None or prediction.step_seconds is None:
            return "not measured"
        spread = relative_spread(error)
        off_a_line = prediction.source in ("interpolated", "extrapolated")
        if spread > MAX_RELATIVE_SPREAD and (off_a_line or not self._weighs_error):
            seconds = prediction.step_seconds
            return f"throughput too uncertain: step time {duration(seconds)} ± {percent(spread)}"
        if not self.noise_measurable(configuration):
            return "noise cannot be measured: one part per step"
        return ""


def _with_measured(peak: PeakMemory, prediction: Prediction | None) -> PeakMemory:
    """The memory model's answer, overruled by a measured peak, by a run that fitted and by one that did not."""
    if prediction is None:
        return peak
    if prediction.peak_bytes is not None:
        measured = float(prediction.peak_bytes)
        peak = replace(peak, expected_bytes=measured, low_bytes=measured, high_bytes=measured)
    if peak.chance_to_fit is not None and prediction.failure == OUT_OF_MEMORY:
        return replace(peak, chance_to_fit=0.0)
    if peak.chance_to_fit is not None and prediction.memory_seen:
        return replace(peak, chance_to_fit=1.0)
    return peak
