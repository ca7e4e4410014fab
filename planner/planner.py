"""The planner: from the noise scale and the step times to a decision that explains itself.

`Planner.decide` is the way through this package:

    φ now, and its forecast            `planner.critical_batch`
    candidates                         `planner.space`, without those that `planner.pruning` rules out
    their step times, memory, refusals `planner.predictor`
    their Goodput                      `planner.goodput`
    the choice                         a policy of `planner.policies`, which sees a `planner.situation`
    verdict and saving of each         `planner.verdicts`, `planner.outlook`
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.critical_batch import CriticalBatchTracker
from planner.decision_times import decision_interval
from planner.efficiency import statistical_efficiency
from planner.forecast import QUANTILE_90, CriticalBatchForecast
from planner.goodput import goodput
from planner.horizon import Horizon
from planner.menu import Menu, rung_of
from planner.move_costs import MoveCosts
from planner.outlook import Outlook, look_ahead
from planner.policies.norm_test import plug_in_batch
from planner.policies.policy import Static, make_policy
from planner.predictor import CandidateEstimate, Predictor
from planner.sampling import half_life
from planner.situation import Situation
from planner.small_batch import accumulation_purpose
from planner.trials import Trial, TrialLedger
from planner.verdicts import with_verdicts, worth_keeping
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision
from profiles.formatting import noise_in_words, three_digits
from profiles.noise_scale import NoiseScale, StepNorms
from profiles.throughput import Throughput

FORECAST_REACH = 2
"""A decision shows the noise scale that is expected when this many times the tokens will have been seen."""
UNKNOWN_DECISIONS = 200
"""Length of a job whose length is not known, in decisions."""
LEARNING_HALF_LIVES = 4
"""Stretch on each side of a change of batch that c is learned from, in half-lives of the noise scale."""


@dataclass(frozen=True)
class _Moment:
    """What the job shows when it decides."""

    noise: NoiseScale
    critical_batch: float | None
    """φ now, sequences; None while it is unknown."""
    forecast: CriticalBatchForecast
    """φ from now on."""
    samples_consumed: int
    seconds_left: float
    step_norms: StepNorms | None
    starting: bool
    """Whether this is the choice before the first step, when moves cost nothing and only published laws know φ."""

    @property
    def noise_in_words(self) -> str:
        """What is known of the noise."""
        if self.starting:
            ends = (-QUANTILE_90, 0.0, QUANTILE_90)
            low, value, high = (three_digits(float(self.forecast.at(np.array([1.0]), by)[0])) for by in ends)
            laws = f"published laws suggest a critical batch of {value} ({low}–{high}) sequences"
            return f"nothing is measured yet, {laws}"
        return noise_in_words(self.noise) if self.noise.value is not None else "the noise scale is not known"


@dataclass(frozen=True)
class _Scored:
    """All candidates of a decision with their scores."""

    estimates: dict[Configuration, CandidateEstimate]
    current: CandidateScore
    """What runs, candidate or not."""
    eligible: list[CandidateScore]
    """Those that may be chosen, `current` among them, best first."""
    refused: list[CandidateScore]
    """Those that may not, with the reason as their verdict; best first."""


@dataclass(frozen=True)
class _Outcome:
    """What was chosen among the eligible, and why."""

    chosen: CandidateScore
    reason: str
    eligible: list[CandidateScore]
    """With their verdicts."""
    outlook: Outlook | None = None
    advised: Configuration | None = None
    trial: bool = False


class Planner:
    """Decides what a job runs next. Deterministic; its state is `number` and what it sees of the job."""

    def __init__(
        self,
        predictor: Predictor,
        number: int = 0,
        total_samples: int | None = None,
        lr_decay: Callable[[int], float] | None = None,
        target_loss: float | None = None,
        from_scratch: bool = True,
    ) -> None:
        """`total_samples` is the length of the job in sequences; None if nobody knows. `lr_decay` is the learning rate
        of the schedule over its peak, after so many sequences; None if there is no schedule. `target_loss` ends the
        job sooner, at the first evaluation that reaches it. A job that is not `from_scratch` begins with trained
        weights: what laws say of critical batches is not about it."""
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
        seq_len = predictor.model.seq_len
        memory = half_life(config, self._total_samples, seq_len).at(predictor.start.global_batch)
        self._laws = CriticalBatchForecast.of_laws(self._total_samples, predictor.model)
        self._critical_batch = CriticalBatchTracker(
            config,
            self._total_samples,
            seq_len,
            factor_range=config.critical_batch_factor_range if self.policy.weighs_error else 1.0,
            window_samples=max(1, int(LEARNING_HALF_LIVES * memory)),
            laws=self._laws if from_scratch else None,
        )

    @property
    def throughput(self) -> Throughput:
        """Step times, which the running job's own steps correct."""
        return self.predictor.throughput

    def observe_loss(self, samples_consumed: int, global_batch: int, loss: float) -> None:
        """Feed every step's mean training loss: what changes of batch do to it tells what c is."""
        self._critical_batch.observe_loss(samples_consumed, global_batch, loss)

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
        critical_batch = self._critical_batch.observe_noise(noise, samples_consumed)
        forecast = self._critical_batch.forecast
        starting = samples_consumed == 0 and self.config.start == "plan" and self.policy.picks_start
        if starting:
            forecast = self._laws
            critical_batch = float(forecast.at(np.array([1.0]))[0])
        moment = _Moment(noise, critical_batch, forecast, samples_consumed, seconds_left, step_norms, starting)
        scored = self._score_all(current, critical_batch)
        if why_not := self._why_no_decision(moment, scored.current):
            outcome = _undecided(scored, self._staying(moment, why_not))
        else:
            outcome = self._choose(moment, scored)
        return self._record(moment, scored, outcome)

    def _score_all(self, current: Configuration, critical_batch: float | None) -> _Scored:
        """Score what runs and every candidate, and tell those that may be chosen from those that may not."""
        estimates = {c: self.predictor.estimate(c, beside=current) for c in (current, *self.candidates)}
        mine = self._score(estimates[current], critical_batch, None)
        others = [self._score(e, critical_batch, mine.goodput) for c, e in estimates.items() if c != current]
        if limit := self.move_costs.refusal("layout"):
            others = [_limited(score, current, limit) for score in others]
        # The gain of the current one is 0 by definition, not by division.
        mine = mine.model_copy(update={"verdict": "current", "gain": None if mine.goodput is None else 0.0})
        return _Scored(
            estimates=estimates,
            current=mine,
            eligible=sorted([mine, *(score for score in others if not score.verdict)], key=_rank),
            refused=sorted((score for score in others if score.verdict), key=_rank),
        )

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

    def _why_no_decision(self, moment: _Moment, mine: CandidateScore) -> str:
        """What keeps a policy that decides by Goodput from deciding; empty if nothing does."""
        if not self.policy.needs_noise:
            return ""
        current, noise = mine.configuration, moment.noise
        if moment.critical_batch is not None:
            if mine.goodput is not None:
                return ""
            why = f"the throughput of the current configuration, {current.label}, is not known"
            return f"{moment.noise_in_words}: {why}"
        if not self.predictor.noise_measurable(current):
            return f"the noise scale is unknown, and cannot be measured with {current.label}: one part per step"
        if noise.samples < self.config.min_noise_samples:
            return f"the noise scale has seen {noise.samples} steps, {self.config.min_noise_samples} are needed"
        return f"the noise scale cannot be told yet after {noise.samples} steps"

    def _staying(self, moment: _Moment, why_not: str) -> str:
        """The reason of a decision that cannot be taken: a static job waits for none."""
        if not isinstance(self.policy, Static):
            return f"{why_not}; nothing changes"
        return "the static policy never moves" + (f"; gains are unknown: {why_not}" if moment.noise.samples else "")

    def _choose(self, moment: _Moment, scored: _Scored) -> _Outcome:
        """Let the policy choose among the eligible, and say why."""
        situation = self._situation(moment, scored)
        choice = self.policy.choose(situation)
        outlook = look_ahead(situation) if self.policy.weighs_error and not moment.starting else None
        eligible = with_verdicts(
            scored.eligible, situation, choice, self.policy, outlook, advisory=self.config.advisory
        )
        picked = scored.eligible[int(choice.index[0])]
        reason = self.policy.reason(situation, choice)
        if moment.starting or self.policy.needs_noise or moment.noise.value is not None:
            reason = f"{moment.noise_in_words}: {reason}"
        if picked is not scored.current or moment.starting:
            purpose = accumulation_purpose(picked.configuration, scored.estimates, self.config.max_micro_batch)
            reason = f"{reason}; {purpose}" if purpose else reason
        if picked is not scored.current and self.config.advisory:
            reason = f"{reason}; advisory, so nothing changes"
            return _Outcome(scored.current, reason, eligible, outlook, advised=picked.configuration)
        trial = bool(choice.exploring is not None and choice.exploring[0])
        return _Outcome(picked, reason, eligible, outlook, trial=trial)

    def _situation(self, moment: _Moment, scored: _Scored) -> Situation:
        """The decision as arrays of one run. What is not known is NaN, and a throughput 0: only policies that need
        neither come so far."""
        noise, norms, done = moment.noise.value, moment.step_norms, moment.samples_consumed
        eligible, mine = scored.eligible, scored.current
        to_next = decision_interval(done, mine.configuration.global_batch, self.config.every_samples)
        in_time = moment.seconds_left * mine.samples_per_second if mine.samples_per_second else math.inf  # sequences
        left = max(min(max(self.horizon.end(done) - done, to_next), in_time), to_next)
        errors = [0.0 if score is mine else scored.estimates[score.configuration].error for score in eligible]
        return Situation(
            menu=Menu.of([score.configuration for score in eligible]),
            samples_per_second=np.array([[score.samples_per_second or 0.0 for score in eligible]]),
            throughput_error=np.array([errors]),
            unseen=np.array([[self._unseen(score.configuration) for score in eligible]]),
            current=np.array([eligible.index(mine)]),
            noise_scale=np.array([math.nan if noise is None else noise]),
            critical_batch=np.array([math.nan if moment.critical_batch is None else moment.critical_batch]),
            forecast=moment.forecast,
            samples_consumed=np.array([float(max(done, 1))]),
            samples_left=np.array([float(left)]),
            samples_to_next=np.array([float(to_next)]),
            move_seconds=self.move_costs.seconds(),
            trial_allowance=np.array([self.trials.allowance]),
            objective=self.config.objective,
            number=self.number,
            plug_in=np.array([plug_in_batch(norms, 1.0)]) if norms and norms.grad_sq > 0 else None,
            started=not moment.starting,
            lr_decay=None if self._lr_decay is None else np.array([self._lr_decay(done)]),
            start_batch=np.array([float(self.predictor.start.global_batch)]),
        )

    def _unseen(self, configuration: Configuration) -> bool:
        """Whether a trial would teach something: the configuration never ran, and no trial timed others of its line."""
        return self.predictor.steps_seen(configuration) == 0 and not self.trials.tried(configuration)

    def _record(self, moment: _Moment, scored: _Scored, outcome: _Outcome) -> Decision:
        """The decision as it is written, and counted."""
        current, chosen, outlook = scored.current.configuration, outcome.chosen, outcome.outlook
        always = (current, chosen.configuration, outcome.advised)
        kept = worth_keeping(outcome.eligible, scored.refused, always)
        low, high = self._critical_batch.factor_interval
        decision = Decision(
            number=self.number,
            samples_consumed=moment.samples_consumed,
            policy=self.policy.name,
            objective=self.config.objective,
            noise=moment.noise,
            critical_batch_factor=self._critical_batch.factor,
            critical_batch_factor_low=low,
            critical_batch_factor_high=high,
            critical_batch=moment.critical_batch,
            current=current,
            chosen=chosen.configuration,
            candidates=kept,
            omitted=len(outcome.eligible) + len(scored.refused) - len(kept),
            seconds_left=outlook and outlook.seconds_left,
            critical_batch_low=outlook and outlook.critical_batch_low,
            critical_batch_high=outlook and outlook.critical_batch_high,
            regret_bound=outlook and outlook.regret_bound,
            predicted_gain=chosen.gain,
            reason=outcome.reason,
            forecast=self._critical_batch.noise_scale_at(FORECAST_REACH * max(moment.samples_consumed, 1)),
            advised=outcome.advised,
            trial=outcome.trial,
        )
        self.number += 1
        return decision

    def state(self) -> dict[str, Any]:
        """What a resumed job needs beside the number of the next decision, as plain values."""
        return self._critical_batch.state() | {
            "evaluations": self.horizon.state(),
            "move_costs": self.move_costs.state(),
            "throughput": self.throughput.state(),
            "trials": self.trials.state(),
            "before_trial": self._trial and self._trial.running.model_dump(),
        }

    def restore(self, state: dict[str, Any], with_speeds: bool = True) -> None:
        """Take up what `state` gave; an empty dict changes nothing. Without speeds only what is known of the gradients
        and of the loss: steps, moves and trials of another framework tell nothing of this one's."""
        self._critical_batch.restore(state)
        self.horizon.restore(state.get("evaluations", []))
        if not with_speeds:
            return
        self.move_costs.restore(state.get("move_costs", {}))
        self.throughput.restore(state.get("throughput", {}))
        self.trials.restore(state.get("trials", {}))
        if before_trial := state.get("before_trial"):
            self.before_trial = Configuration.model_validate(before_trial)


def _undecided(scored: _Scored, reason: str) -> _Outcome:
    """What runs goes on, and nothing is said of the others."""
    eligible = [
        score if score.verdict else score.model_copy(update={"verdict": "no decision yet"}) for score in scored.eligible
    ]
    return _Outcome(scored.current, reason, eligible)


def _limited(score: CandidateScore, current: Configuration, limit: str) -> CandidateScore:
    """The candidate, refused if it would take a layout move and there may be none now."""
    if score.verdict or rung_of(current, score.configuration) != "layout":
        return score
    return score.model_copy(update={"verdict": limit})


def _rank(score: CandidateScore) -> tuple[float, int]:
    """Best first: by goodput, by throughput while that is unknown; of equals the smaller batch (2507.07101)."""
    value = score.samples_per_second if score.goodput is None else score.goodput
    return -(value or 0.0), score.configuration.global_batch
