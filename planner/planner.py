"""The planner: from the noise scale and the throughput to a decision that explains itself."""

import math

from planner.config import PlannerConfig
from planner.efficiency import statistical_efficiency
from planner.factor_check import FactorCheck
from planner.forecast import NoiseForecast
from planner.goodput import goodput
from planner.memory_check import MemoryCheck
from planner.policy import Situation, make_policy
from planner.space import candidates, noise_measurable
from planner.wording import noise_in_words, percent
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision
from profiles.model_shape import ModelShape
from profiles.noise_scale import NoiseScale
from profiles.step_norms import StepNorms
from profiles.throughput import Prediction, Throughput

MAX_RELATIVE_SPREAD = 0.5
"""A time whose interval is wider than this share of it is no reason to move: the best of many such guesses is a bad
one."""
FORECAST_REACH = 2
"""A decision shows the noise scale that is expected when this many times the tokens will have been seen."""
CHECK_HALF_LIVES = 4
"""Stretch on each side of a change of batch that c is checked on, in half-lives of the noise scale."""


class Planner:
    """Decides what a job runs next. Deterministic; its state is `number`, `forecast` and what it sees of the job."""

    def __init__(
        self,
        config: PlannerConfig,
        model: ModelShape,
        cluster: Cluster,
        start: Configuration,
        throughput: Throughput,
        number: int = 0,
        memory: MemoryCheck | None = None,
    ) -> None:
        self.config = config
        self.throughput = throughput
        self.candidates = candidates(config, model, cluster, start)
        """Configurations that may be chosen."""
        self._does_not_fit = memory.refusals(self.candidates) if memory else {}
        self.policy = make_policy(config)
        self.number = number
        """Number of the next decision; a resumed job sets it."""
        self.forecast = NoiseForecast(config.noise_half_life_tokens)
        """The noise scale to come; a resumed job restores it."""
        self._seq_len = model.seq_len
        self._check = FactorCheck(max(1, CHECK_HALF_LIVES * config.noise_half_life_tokens // model.seq_len))

    def observe_loss(self, samples_consumed: int, global_batch: int, loss: float) -> str | None:
        """Feed every step's mean training loss. Returns a warning, in one line, when c is clearly off: see
        `planner.factor_check`."""
        return self._check.observe(samples_consumed, global_batch, loss)

    def decide(
        self,
        noise: NoiseScale,
        current: Configuration,
        samples_consumed: int,
        step_norms: StepNorms | None = None,
    ) -> Decision:
        """Score every candidate and let the policy choose. `current` is what runs, candidate or not; `step_norms` are
        those of the steps since the last decision."""
        critical_batch = self._critical_batch(noise)
        self._look_ahead(noise, critical_batch, samples_consumed)
        mine = self._score(current, critical_batch, None)
        others = [self._score(c, critical_batch, mine.goodput) for c in self.candidates if c != current]
        # The gain of the current one is 0 by definition, not by division.
        mine = mine.model_copy(update={"verdict": "current", "gain": None if mine.goodput is None else 0.0})
        eligible = sorted([mine, *(score for score in others if not score.verdict)], key=_rank)
        refused = sorted((score for score in others if score.verdict), key=_rank)
        if critical_batch is None:
            chosen, reason = mine, f"{self._why_unknown(noise, current)}; nothing changes"
        elif mine.goodput is None:
            why = f"the throughput of the current configuration, {current.label}, is not known"
            chosen, reason = mine, f"{noise_in_words(noise)}: {why}; nothing changes"
        else:
            situation = Situation(samples_consumed, noise, critical_batch, mine, eligible, self.number, step_norms)
            chosen, why = self.policy.choose(situation)
            reason = f"{noise_in_words(noise)}: {why}"
        judged = [
            score.model_copy(update={"verdict": score.verdict or self._verdict(score, mine, chosen)})
            for score in eligible
        ]
        decision = Decision(
            number=self.number,
            samples_consumed=samples_consumed,
            policy=self.policy.name,
            objective=self.config.objective,
            noise=noise,
            critical_batch_factor=self.config.critical_batch_factor,
            critical_batch=critical_batch,
            current=current,
            chosen=chosen.configuration,
            candidates=judged + refused,
            predicted_gain=chosen.gain,
            reason=reason,
            forecast=self.forecast.at(FORECAST_REACH * max(samples_consumed, 1) * self._seq_len),
        )
        self.number += 1
        return decision

    def _look_ahead(self, noise: NoiseScale, critical_batch: float | None, samples_consumed: int) -> None:
        """Tell the forecast and the check of c what the noise scale is now."""
        self._check.critical_bounds = None
        if critical_batch is None:
            return
        self.forecast.observe(samples_consumed * self._seq_len, noise)
        if noise.low is not None and noise.high is not None:
            factor = self.config.critical_batch_factor
            self._check.critical_bounds = (factor * noise.low, factor * noise.high)

    def _critical_batch(self, noise: NoiseScale) -> float | None:
        """φ = c · B_simple, sequences; None while the noise scale is unknown or has seen too little."""
        value = noise.value
        if value is None or not 0 < value < math.inf or noise.samples < self.config.min_noise_samples:
            return None
        return self.config.critical_batch_factor * value

    def _why_unknown(self, noise: NoiseScale, current: Configuration) -> str:
        """Why there is no critical batch."""
        if not self._noise_measurable(current):
            return f"the noise scale is unknown, and cannot be measured with {current.label}: one part a step"
        if noise.samples < self.config.min_noise_samples:
            return f"the noise scale has seen {noise.samples} steps, {self.config.min_noise_samples} are needed"
        return f"the noise scale cannot be told yet after {noise.samples} steps"

    def _noise_measurable(self, configuration: Configuration) -> bool:
        return noise_measurable(configuration, self.config.noise_source)

    def _score(
        self, configuration: Configuration, critical_batch: float | None, current_goodput: float | None
    ) -> CandidateScore:
        """Everything about one candidate; the verdict is filled in only where it may not be chosen."""
        prediction = self.throughput.predict(configuration)
        seconds = prediction.step_seconds if prediction else None
        batch = configuration.global_batch
        samples_per_second = None if seconds is None else batch / seconds
        score = None
        if samples_per_second is not None and critical_batch is not None:
            score = goodput(samples_per_second, batch, critical_batch, self.config.objective)
        return CandidateScore(
            configuration=configuration,
            step_seconds=seconds,
            step_seconds_spread=prediction.spread_seconds if prediction else None,
            source=prediction.source if prediction else "none",
            samples_per_second=samples_per_second,
            efficiency=None if critical_batch is None else statistical_efficiency(batch, critical_batch),
            goodput=score,
            gain=None if score is None or current_goodput is None else score / current_goodput - 1,
            verdict=self._refusal(configuration, prediction),
            peak_bytes=prediction.peak_bytes if prediction else None,
        )

    def _refusal(self, configuration: Configuration, prediction: Prediction | None) -> str:
        """Why a candidate may not be chosen whatever the noise; empty where it may."""
        if prediction is None:
            return self._does_not_fit.get(configuration, "not measured")
        if prediction.failure:
            return prediction.failure
        step_seconds, spread_seconds = prediction.step_seconds, prediction.spread_seconds
        if step_seconds and spread_seconds and spread_seconds > MAX_RELATIVE_SPREAD * step_seconds:
            return f"throughput too uncertain: a step takes {step_seconds:.3g} ± {spread_seconds:.2g} s"
        return "" if self._noise_measurable(configuration) else "noise cannot be measured: one part a step"

    def _verdict(self, score: CandidateScore, current: CandidateScore, chosen: CandidateScore) -> str:
        """What became of a candidate that could be chosen."""
        if score.gain is None:
            return "no decision yet"
        if score is chosen:
            return "CHOSEN"
        if score.gain >= 0:
            return self.policy.verdict(score)
        slower = (score.samples_per_second or 0.0) < (current.samples_per_second or 0.0)
        return f"{'slower' if slower else 'lower goodput'}: {percent(score.gain)}"


def _rank(score: CandidateScore) -> tuple[float, int]:
    """Best first: by goodput, by throughput while that is unknown; of equals the smaller batch (2507.07101)."""
    value = score.samples_per_second if score.goodput is None else score.goodput
    return -(value or 0.0), score.configuration.global_batch
