"""The planner: from the noise scale and the throughput to a decision that explains itself."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from planner.critical_batch import CriticalBatchFactor
from planner.efficiency import statistical_efficiency
from planner.forecast import QUANTILE_90, CriticalBatchForecast, log_error
from planner.goodput import goodput
from planner.horizon import Horizon
from planner.menu import Menu, rung_of
from planner.move_costs import MoveCosts
from planner.outlook import Outlook, look_ahead
from planner.policies.norm_test import plug_in_batch
from planner.policies.policy import make_policy
from planner.predictor import CandidateEstimate, Predictor
from planner.sampling import half_life
from planner.situation import Choice, Situation
from planner.small_batch import accumulation_purpose
from planner.trials import Trial, TrialLedger
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision
from profiles.forecast import Forecast
from profiles.formatting import noise_in_words, percent, three_digits
from profiles.noise_scale import NoiseScale
from profiles.step_norms import StepNorms
from profiles.throughput import Throughput

FORECAST_REACH = 2
"""A decision shows the noise scale that is expected when this many times the tokens will have been seen."""
UNKNOWN_DECISIONS = 200
"""Length of a job whose length is not known, in decisions."""
MOST_ELIGIBLE, MOST_REFUSED = 12, 8
"""Candidates that a decision keeps of those that may be chosen, the best, and of those that may not."""
FEWEST_STEPS_BETWEEN = 10
"""Steps between two decisions, at least: fewer show nothing new, and all ranks wait for a decision."""
LEAST_SHARE_BETWEEN = 1 / 200
"""Share of all sequences so far that two decisions are apart, at least: the noise scale grows with the logarithm of the
sequences, so decisions in equal ratios miss nothing, and the event log of a long run stays small."""
LEARNING_HALF_LIVES = 4
"""Stretch on each side of a change of batch that c is learned from, in half-lives of the noise scale."""


def decision_interval(samples_consumed: int, global_batch: int, every_samples: int) -> int:
    """Sequences between two decisions: `every_samples`, doubled until these are `FEWEST_STEPS_BETWEEN` steps and
    `LEAST_SHARE_BETWEEN` of the run so far."""
    least = max(FEWEST_STEPS_BETWEEN * global_batch, LEAST_SHARE_BETWEEN * samples_consumed)
    return every_samples * 2 ** max(0, math.ceil(math.log2(least / every_samples)))


def decision_is_due(samples_before: int, samples_consumed: int, global_batch: int, every_samples: int) -> bool:
    """Whether a step that ended at `samples_consumed` crossed a multiple of the interval between decisions. A resumed
    run decides at the same places: nothing has to be remembered for it."""
    interval = decision_interval(samples_consumed, global_batch, every_samples)
    return samples_before // interval < samples_consumed // interval


class Planner:
    """Decides what a job runs next. Deterministic; its state is `number` and what it sees of the job."""

    def __init__(
        self,
        predictor: Predictor,
        number: int = 0,
        total_samples: int | None = None,
        lr_decay: Callable[[int], float] | None = None,
        target_loss: float | None = None,
    ) -> None:
        """`total_samples` is the length of the job in sequences; None if nobody knows. `lr_decay` is the learning rate
        of the schedule over its peak, after so many sequences; None if there is no schedule. `target_loss` ends the
        job sooner, at the first evaluation that reaches it."""
        self.predictor = predictor
        """What is expected of configurations, and which may be chosen."""
        self.config = config = predictor.config
        self.candidates = predictor.candidates
        """Configurations that may be chosen."""
        self.policy = make_policy(config)
        self.number = number
        """Number of the next decision; a resumed job sets it."""
        self.move_costs = MoveCosts(predictor.layout_move_seconds, config.max_layout_moves_per_hour)
        """What moves cost: the loop feeds it every one."""
        self.trials = TrialLedger(config.trial_budget)
        """What trials have cost, and may cost."""
        self._trial: Trial | None = None
        self.before_trial: Configuration | None = None
        """What ran before the trial that the checkpoint fell into; None if there was none."""
        self._lr_decay = lr_decay
        self._total_samples = total_samples or UNKNOWN_DECISIONS * config.every_samples
        self.horizon = Horizon(self._total_samples, target_loss)
        """Where the job ends: the loop feeds it every evaluation."""
        self._forecast = CriticalBatchForecast.unknown(np.array([float(self._total_samples)]))
        self._observed_at = 0
        self._seq_len = predictor.model.seq_len
        memory = half_life(config, self._total_samples, self._seq_len).at(predictor.start.global_batch)
        self._factor = CriticalBatchFactor(
            config.critical_batch_factor,
            config.critical_batch_factor_range if self.policy.weighs_error else 1.0,
            max(1, int(LEARNING_HALF_LIVES * memory)),
        )

    @property
    def throughput(self) -> Throughput:
        """Step times, which the running job's own steps correct."""
        return self.predictor.throughput

    def observe_loss(self, samples_consumed: int, global_batch: int, loss: float) -> None:
        """Feed every step's mean training loss: what changes of batch do to it tells what c is."""
        self._factor.observe(samples_consumed, global_batch, loss)

    def observe_step(self, executed: Configuration, seconds: float, settled: bool) -> None:
        """Feed every step: as what it was executed, how long it took, and whether it was an ordinary one after the
        configuration had settled. Steps of a trial only count beside those of what ran before (`end_trial`)."""
        if settled and self._trial is None:
            self.throughput.observe(executed, seconds)
        self.trials.observe_step(seconds, settled)

    def observe_move(self, before: Configuration, after: Configuration, seconds: float) -> None:
        """Feed every move: training stood still for so long."""
        self.move_costs.observe(rung_of(before, after), seconds)
        self.trials.observe_move(seconds)

    def begin_trial(self, decision: Decision) -> Trial:
        """The trial that a decision asks for."""
        scores = {score.configuration: score for score in decision.candidates}
        useful = [
            (scores[configuration].goodput or 1.0) * (scores[configuration].step_seconds or 1.0)  # progress of a step
            for configuration in (decision.chosen, decision.current)
        ]
        break_even = useful[0] / useful[1]
        self._trial = Trial(decision.number, decision.chosen, decision.current, self.trials.recent, break_even)
        return self._trial

    def end_trial(self, trial: Trial) -> None:
        """Take in what a trial has shown, and what it has cost."""
        self._trial = None
        self.trials.close(trial)
        if trial.ratio is not None:
            candidate, running = (self.predictor.typical(c) for c in (trial.candidate, trial.running))
            self.throughput.observe_comparison(candidate, running, trial.ratio.log, trial.ratio.error)

    def decide(
        self,
        noise: NoiseScale,
        current: Configuration,
        samples_consumed: int,
        step_norms: StepNorms | None = None,
        seconds_left: float = math.inf,
    ) -> Decision:
        """Score every candidate and let the policy choose. `current` is what runs, candidate or not; `step_norms` are
        those of the steps since the last decision; training stops after `seconds_left`, if not before."""
        starting = samples_consumed == 0 and self.config.start == "plan" and self.policy.picks_start
        critical_batch = self._look_ahead(noise, samples_consumed)
        factor = self._factor.value / self.config.critical_batch_factor
        forecast = self._forecast.scaled(factor, self._factor.error)
        if starting:
            forecast = CriticalBatchForecast.of_laws(self._total_samples, self.predictor.model)
            critical_batch = float(forecast.at(np.array([1.0]))[0])
        estimates = {c: self.predictor.estimate(c, beside=current) for c in (current, *self.candidates)}
        mine = self._score(estimates[current], critical_batch, None)
        others = [self._score(e, critical_batch, mine.goodput) for c, e in estimates.items() if c != current]
        if limit := self.move_costs.refusal("layout"):
            others = [self._limited(score, current, limit) for score in others]
        # The gain of the current one is 0 by definition, not by division.
        mine = mine.model_copy(update={"verdict": "current", "gain": None if mine.goodput is None else 0.0})
        eligible = sorted([mine, *(score for score in others if not score.verdict)], key=_rank)
        refused = sorted((score for score in others if score.verdict), key=_rank)
        advised, trial, outlook = None, False, None
        noise_words = noise_in_words(noise) if noise.value is not None else "the noise scale is not known"
        if starting:
            noise_words = self._laws_in_words(forecast)
        if self.policy.needs_noise and critical_batch is None:
            chosen, reason = mine, f"{self._why_unknown(noise, current)}; nothing changes"
        elif self.policy.needs_noise and mine.goodput is None:
            why = f"the throughput of the current configuration, {current.label}, is not known"
            chosen, reason = mine, f"{noise_words}: {why}; nothing changes"
        else:
            situation = self._situation(eligible, mine, estimates, noise, critical_batch, samples_consumed, step_norms)
            within = seconds_left * mine.samples_per_second if mine.samples_per_second else math.inf  # sequences
            left = np.maximum(np.minimum(situation.samples_left, within), situation.samples_to_next)
            situation = replace(situation, forecast=forecast, started=not starting, samples_left=left)
            choice = self.policy.choose(situation)
            picked = eligible[int(choice.index[0])]
            if self.policy.weighs_error and not starting:
                outlook = look_ahead(situation)
            eligible = self._judge(situation, choice, outlook, eligible, mine)
            reason = self.policy.reason(situation, choice)
            if starting or self.policy.needs_noise or noise.value is not None:
                reason = f"{noise_words}: {reason}"
            if picked is not mine or starting:
                purpose = accumulation_purpose(picked.configuration, estimates, self.config.max_micro_batch)
                reason = f"{reason}; {purpose}" if purpose else reason
            chosen = mine
            if picked is not mine and self.config.advisory:
                advised, reason = picked.configuration, f"{reason}; advisory, so nothing changes"
            else:
                chosen = picked
                trial = bool(choice.exploring is not None and choice.exploring[0])
        judged = [
            score if score.verdict else score.model_copy(update={"verdict": "no decision yet"}) for score in eligible
        ]
        named = (current, chosen.configuration, advised)
        kept = [
            score for rank, score in enumerate(judged) if rank < MOST_ELIGIBLE or score.configuration in named
        ] + refused[:MOST_REFUSED]
        decision = Decision(
            number=self.number,
            samples_consumed=samples_consumed,
            policy=self.policy.name,
            objective=self.config.objective,
            noise=noise,
            critical_batch_factor=self._factor.value,
            critical_batch_factor_low=self._factor.ends[0],
            critical_batch_factor_high=self._factor.ends[1],
            critical_batch=critical_batch,
            current=current,
            chosen=chosen.configuration,
            candidates=kept,
            omitted=len(judged) + len(refused) - len(kept),
            seconds_left=outlook and outlook.seconds_left,
            critical_batch_low=outlook and outlook.critical_batch_low,
            critical_batch_high=outlook and outlook.critical_batch_high,
            regret_bound=outlook and outlook.regret_bound,
            predicted_gain=chosen.gain,
            reason=reason,
            forecast=self._noise_to_come(FORECAST_REACH * max(samples_consumed, 1)),
            advised=advised,
            trial=trial,
        )
        self.number += 1
        return decision

    def _look_ahead(self, noise: NoiseScale, samples_consumed: int) -> float | None:
        """φ now, in sequences; None while the noise scale is unknown. Tells the forecast, which is of φ with the c
        of the job file, and the posterior of c about it.

        The noise scale is an average, which belongs to its centroid. The forecast takes it up there, and says what it
        has grown by since then.
        """
        self._factor.noise_scale = None
        measured = self._critical_batch(noise)
        if measured is None:
            return None
        assert noise.value is not None, "there is a critical batch"
        here = float(max(samples_consumed, 1))
        centre = min(noise.centroid or here, here)
        # For an average that forgets exponentially, `here - centre` is the number of sequences in which its memory
        # fades to 1/e: so much of it was in the estimate of the last decision too.
        passed = samples_consumed - self._observed_at
        repeated = math.exp(-max(passed, 1) / (here - centre)) if self._observed_at and centre < here else 0.0
        self._forecast.observe(
            np.array([centre]),
            np.array([measured]),
            np.array([log_error(noise.value, noise.low, noise.high)]),
            (1 - repeated) / (1 + repeated),
        )
        self._observed_at = samples_consumed
        grown = float(self._forecast.grown(np.array([centre]), np.array([here]))[0])
        self._factor.noise_scale = grown * noise.value, log_error(noise.value, noise.low, noise.high)
        return self._factor.value * grown * noise.value

    def _laws_in_words(self, forecast: CriticalBatchForecast) -> str:
        """What is taken for the critical batch before the first step."""
        low, value, high = (
            three_digits(float(forecast.at(np.array([1.0]), sigmas)[0])) for sigmas in (-QUANTILE_90, 0.0, QUANTILE_90)
        )
        return f"nothing is measured yet, published laws suggest a critical batch of {value} ({low}–{high}) sequences"

    def _noise_to_come(self, samples: int) -> Forecast | None:
        """The noise scale to be expected after so many sequences: the forecast is of φ = c · B_simple."""
        if not self._forecast.samples[0]:
            return None
        ends = (
            float(self._forecast.at(np.array([float(samples)]), sigmas)[0]) / self.config.critical_batch_factor
            for sigmas in (-QUANTILE_90, 0.0, QUANTILE_90)
        )
        low, value, high = ends
        return Forecast(tokens=samples * self._seq_len, value=value, low=low, high=high)

    def _critical_batch(self, noise: NoiseScale) -> float | None:
        """φ = c · B_simple where it was measured, with the c of the job file, sequences; None while that is unknown or
        has seen too little."""
        value = noise.value
        if value is None or not 0 < value < math.inf or noise.samples < self.config.min_noise_samples:
            return None
        return self.config.critical_batch_factor * value

    def _why_unknown(self, noise: NoiseScale, current: Configuration) -> str:
        """Why there is no critical batch."""
        if not self.predictor.noise_measurable(current):
            return f"the noise scale is unknown, and cannot be measured with {current.label}: one part per step"
        if noise.samples < self.config.min_noise_samples:
            return f"the noise scale has seen {noise.samples} steps, {self.config.min_noise_samples} are needed"
        return f"the noise scale cannot be told yet after {noise.samples} steps"

    def _score(
        self, estimate: CandidateEstimate, critical_batch: float | None, current_goodput: float | None
    ) -> CandidateScore:
        """Everything about one candidate; the verdict is filled in only if it may not be chosen."""
        samples_per_second, batch = estimate.samples_per_second, estimate.configuration.global_batch
        score = None
        if samples_per_second is not None and critical_batch is not None:
            score = goodput(samples_per_second, batch, critical_batch, self.config.objective)
        return CandidateScore(
            configuration=estimate.configuration,
            step_seconds=estimate.step_seconds,
            step_seconds_spread=estimate.spread_seconds,
            source=estimate.source,
            samples_per_second=samples_per_second,
            efficiency=None if critical_batch is None else statistical_efficiency(batch, critical_batch),
            goodput=score,
            gain=None if score is None or current_goodput is None else score / current_goodput - 1,
            verdict="" if estimate.can_run and not self.policy.needs_noise else estimate.refusal,
            peak_bytes=round(estimate.peak.expected_bytes),
        )

    @staticmethod
    def _limited(score: CandidateScore, current: Configuration, limit: str) -> CandidateScore:
        """The candidate, refused where it would take a layout move and there may be none now."""
        if score.verdict or rung_of(current, score.configuration) != "layout":
            return score
        return score.model_copy(update={"verdict": limit})

    def _situation(
        self,
        eligible: list[CandidateScore],
        mine: CandidateScore,
        estimates: dict[Configuration, CandidateEstimate],
        noise: NoiseScale,
        critical_batch: float | None,
        samples_consumed: int,
        step_norms: StepNorms | None,
    ) -> Situation:
        """The decision as arrays of one run. What is not known is NaN, and a throughput 0: only policies that need
        neither come so far."""
        to_next = decision_interval(samples_consumed, mine.configuration.global_batch, self.config.every_samples)
        errors = [0.0 if score is mine else estimates[score.configuration].error for score in eligible]
        return Situation(
            menu=Menu.of([score.configuration for score in eligible]),
            samples_per_second=np.array([[score.samples_per_second or 0.0 for score in eligible]]),
            throughput_error=np.array([errors]),
            unseen=np.array([[self._unseen(score.configuration) for score in eligible]]),
            current=np.array([eligible.index(mine)]),
            noise_scale=np.array([math.nan if noise.value is None else noise.value]),
            critical_batch=np.array([math.nan if critical_batch is None else critical_batch]),
            forecast=self._forecast,
            samples_consumed=np.array([float(max(samples_consumed, 1))]),
            samples_left=np.array([float(max(self.horizon.end(samples_consumed) - samples_consumed, to_next))]),
            samples_to_next=np.array([float(to_next)]),
            move_seconds=self.move_costs.seconds(),
            trial_allowance=np.array([self.trials.allowance]),
            objective=self.config.objective,
            number=self.number,
            lr_decay=None if self._lr_decay is None else np.array([self._lr_decay(samples_consumed)]),
            start_batch=np.array([float(self.predictor.start.global_batch)]),
            plug_in=np.array([plug_in_batch(step_norms, 1.0)]) if step_norms and step_norms.grad_sq > 0 else None,
        )

    def _unseen(self, configuration: Configuration) -> bool:
        """Whether a trial would teach something: the configuration never ran, and no trial timed others of its line."""
        return self.predictor.steps_seen(configuration) == 0 and not self.trials.tried(configuration)

    def _judge(
        self,
        situation: Situation,
        choice: Choice,
        outlook: Outlook | None,
        eligible: list[CandidateScore],
        mine: CandidateScore,
    ) -> list[CandidateScore]:
        """The candidates that could be chosen, with what became of them."""
        costs = situation.menu.move_seconds(situation.current, situation.move_seconds)[0]
        saved = choice.saved_seconds
        with np.errstate(divide="ignore", invalid="ignore"):  # a throughput of 0 is not known
            seconds = situation.samples_left[0] / situation.samples_per_second[0]
            equal_tokens = np.nan_to_num(seconds[situation.current[0]] - seconds, posinf=0.0, neginf=0.0)
        chosen = "WOULD BE CHOSEN" if self.config.advisory else "CHOSEN"
        judged = []
        for index, score in enumerate(eligible):
            if score is mine:
                verdict = "current"
            elif index == choice.index[0]:
                verdict = chosen
            elif (score.gain or 0.0) >= 0:
                verdict = self.policy.verdict(situation, choice, index)
            else:
                slower = (score.samples_per_second or 0.0) < (mine.samples_per_second or 0.0)
                verdict = f"{'slower' if slower else 'lower goodput'}: {percent(score.gain or 0.0)}"
            figures = {
                "verdict": verdict,
                "move_seconds": float(costs[index]),
                "saved_seconds": None if saved is None else float(saved[0, index]),
                "saved_equal_tokens_seconds": float(equal_tokens[index] - costs[index]),
            }
            if outlook is not None:
                figures |= {
                    "saved_low_seconds": float(outlook.saved_low[index]),
                    "saved_expected_seconds": float(outlook.saved_expected[index]),
                    "saved_high_seconds": float(outlook.saved_high[index]),
                }
            judged.append(score.model_copy(update=figures))
        return judged

    def state(self) -> dict[str, Any]:
        """What a resumed job needs beside the number of the next decision, as plain values."""
        return {
            "forecast": self._forecast.state() | {"observed_at": self._observed_at},
            "factor": self._factor.state(),
            "evaluations": self.horizon.state(),
            "move_costs": self.move_costs.state(),
            "throughput": self.throughput.state(),
            "trials": self.trials.state(),
            "before_trial": self._trial and self._trial.running.model_dump(),
        }

    def restore(self, state: dict[str, Any], with_speeds: bool = True) -> None:
        """Take up what `state` gave; an empty dict changes nothing. Without speeds only what is known of the gradients
        and of the loss: steps, moves and trials of another framework tell nothing of this one's."""
        if not with_speeds:
            state = {name: state[name] for name in ("forecast", "factor", "evaluations") if name in state}
        self.move_costs.restore(state.get("move_costs", {}))
        self.throughput.restore(state.get("throughput", {}))
        self.trials.restore(state.get("trials", {}))
        self._factor.restore(state.get("factor", {}))
        self.horizon.restore(state.get("evaluations", []))
        if before_trial := state.get("before_trial"):
            self.before_trial = Configuration.model_validate(before_trial)
        if forecast := state.get("forecast"):
            self._forecast.restore(forecast)
            self._observed_at = forecast["observed_at"]


def _rank(score: CandidateScore) -> tuple[float, int]:
    """Best first: by goodput, by throughput while that is unknown; of equals the smaller batch (2507.07101)."""
    value = score.samples_per_second if score.goodput is None else score.goodput
    return -(value or 0.0), score.configuration.global_batch
