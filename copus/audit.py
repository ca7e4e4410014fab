"""The audit of a run: what its log says of time lost, of predictions, and of what else it could have done."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np

from copus.event_lines import done_again, read_decision
from copus.events import (
    Audited,
    DecisionTaken,
    End,
    Event,
    Failure,
    Noise,
    Profile,
    Reconfigure,
    Restart,
    Start,
    Step,
    Trial,
    Warned,
    read_events,
)
from planner.config import PlannerConfig
from planner.forecast import log_error
from planner.hindsight import FACTOR_ERROR, FEWEST_STEPS, WIDEST, PastRun, PredictedTime, look_back
from planner.menu import RUNGS, Floats, Rung, rung_of
from planner.trials import SETTLING_STEPS
from profiles.audit import Audit, PredictionCheck
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision
from profiles.throughput import DECILE

RECENT_STEPS = 20
"""Steps before a move that say how the machine was."""


def audit_run(run: Path) -> Audit:
    """Audit a run by its log; it may still be going on. Without any training all times are 0 and all gains None."""
    return audit_events(run, read_events(run))[0]


def audit_events(run: Path, log: Iterable[Event]) -> tuple[Audit, list["Outcome"]]:
    """The same from the events of the run's log, and each prediction that was checked."""
    events = _signs_of_work(log)
    lost = done_again(events)
    counted = [event for place, event in enumerate(events) if place not in lost]
    repeated = sum(event.seconds for place, event in enumerate(events) if place in lost and isinstance(event, Step))
    training_seconds, down_seconds = _times(events)
    moves = [event for event in counted if isinstance(event, Reconfigure)]
    trials = [event for event in counted if isinstance(event, Trial)]
    course = _Course(run, counted)
    past = course.past_run()
    audit = Audit(
        training_seconds=training_seconds,
        compared_seconds=past.own_seconds if past else 0.0,
        trial_seconds=sum(trial.seconds for trial in trials),
        trial_move_seconds=sum(trial.move_seconds for trial in trials),
        move_seconds=sum(move.seconds for move in moves if not move.trial),
        measuring_seconds=sum(event.seconds for event in events if isinstance(event, Profile)),
        restart_seconds=down_seconds + repeated,
        moves=sum(not move.trial for move in moves) + sum(trial.outcome == "stayed" for trial in trials),
        trials=len(trials),
        predictions=_checked(course.outcomes),
    )
    return (_with_hindsight(audit, past) if past else audit), course.outcomes


def past_run_of(run: Path) -> PastRun | None:
    """The steps of a run, by its log, as arrays. None without a step."""
    events = _signs_of_work(read_events(run))
    lost = done_again(events)
    return _Course(run, (event for place, event in enumerate(events) if place not in lost)).past_run()


def _signs_of_work(log: Iterable[Event]) -> list[Event]:
    """A failure is no sign of life, and may come from a rank that outlives the others."""
    return [event for event in log if not isinstance(event, Failure | Warned | Audited)]


def _with_hindsight(audit: Audit, past: PastRun) -> Audit:
    """The audit with what compares the run with others, as far as it is known."""
    fields: dict[str, object] = {"first": past.configurations[0]}
    if hindsight := look_back(past):
        fields |= {
            "best_fixed": past.configurations[hindsight.best_fixed],
            "best_fixed_ran": hindsight.best_fixed_ran,
            "gain_over_first_pct": hindsight.gain_over_first,
            "gain_over_best_fixed_pct": hindsight.gain_over_best_fixed,
            "regret_to_best_schedule_pct": hindsight.regret_to_best_schedule,
        }
    return audit.model_copy(update=fields)


def _times(events: Sequence[Event]) -> tuple[float, float]:
    """Seconds from the start of training to its end, without what passed between a stop and its resume; and the share
    of them in which the workers were down after a failure."""
    training = down = 0.0
    began: Event | None = None
    last: Event | None = None
    typed = True  # whether a person launched the workers that come up next
    for event in events:
        if isinstance(event, Restart):
            typed = event.attempt == 0 and not event.requeued
            continue
        if isinstance(event, Start):
            if began is not None and last is not None and typed:
                training += max(0.0, last.time - began.time)
                began = None
            elif last is not None and began is not None:
                down += max(0.0, event.time - last.time)
            began, typed = began or event, False
        if began is not None and not isinstance(event, Profile):
            last = event
        if isinstance(event, End):
            typed = True
    if began is not None and last is not None:
        training += max(0.0, last.time - began.time)
    return training, down


class Outcome(NamedTuple):
    """A prediction and what came true."""

    score: CandidateScore
    """The prediction."""
    seen_seconds: float
    """Median of the settled steps, on the machine as it was when the planner predicted."""

    @property
    def held(self) -> bool:
        """Whether what was seen lies in the 80 % interval of the prediction."""
        predicted = self.score.step_seconds
        assert predicted is not None, "only predictions are checked"
        spread = math.log1p((self.score.step_seconds_spread or 0.0) / predicted)
        return abs(math.log(self.seen_seconds / predicted)) <= spread


def _checked(outcomes: Sequence[Outcome]) -> PredictionCheck:
    """Whether predictions came true."""
    if not outcomes:
        return PredictionCheck(count=0, mape_pct=None, coverage_pct=None)
    misses = [abs(outcome.seen_seconds / (outcome.score.step_seconds or math.inf) - 1) for outcome in outcomes]
    coverage = mean(outcome.held for outcome in outcomes)
    return PredictionCheck(count=len(outcomes), mape_pct=100 * mean(misses), coverage_pct=100 * coverage)


def _factor_error(decision: Decision | None) -> float:
    """Standard error of log c, by what the run had learned of it in the end."""
    if decision is None or decision.critical_batch_factor_low is None or decision.critical_batch_factor_high is None:
        return FACTOR_ERROR
    return log_error(decision.critical_batch_factor_low, decision.critical_batch_factor_high)


def _log_error(score: CandidateScore) -> float:
    """Standard error of the logarithm of a predicted step time."""
    return math.log1p((score.step_seconds_spread or 0.0) / (score.step_seconds or 1.0)) / DECILE


class _Course:
    """What counts of a run, gone through once."""

    def __init__(self, run: Path, events: Iterable[Event]) -> None:
        self._run = run
        self.outcomes: list[Outcome] = []
        """Predictions that the run checked."""
        self._numbers: dict[Configuration, int] = {}
        self._steps: list[tuple[int, float, float, float, bool]] = []
        self._noise: list[tuple[float, float, float]] = []
        self._scores: dict[Configuration, tuple[Configuration, float, CandidateScore]] = {}
        self._newest: Decision | None = None
        self._moves: defaultdict[Rung, list[float]] = defaultdict(list)
        self._lost = 0.0
        self._running: Configuration | None = None
        self._since_change = 0
        self._expected: CandidateScore | None = None
        self._drift = 1.0
        self._seen: list[float] = []
        waiting: DecisionTaken | None = None
        for event in events:
            if isinstance(event, DecisionTaken):
                self._lost += event.seconds
                waiting = event
            elif isinstance(event, Reconfigure):
                made = self._decision(waiting)
                waiting = None
                self._lost += event.seconds
                self._moves[event.rung].append(event.seconds)
                asked = made is not None and made.number == event.decision and made.chosen == event.after
                self._change(event.after, made if asked else None)
            elif isinstance(event, Start):
                self._change(event.configuration, None)
            elif isinstance(event, Step):
                self._step(event)
            elif isinstance(event, Noise) and event.value and 0 < event.value < math.inf:
                error = log_error(event.low, event.high)
                # An average belongs to its centre of gravity: filed later, a growing noise scale would be read late.
                centroid = event.noise.centroid
                place = event.samples_consumed if centroid is None else centroid
                self._noise.append((place, math.log(event.value), error))
        self._decision(waiting)
        self._check()

    def _decision(self, taken: DecisionTaken | None) -> Decision | None:
        """Take in the predictions of a decision; None for one that is not there, or of another version."""
        made = read_decision(self._run, taken) if taken else None
        if made is None:
            return None
        decision = self._newest = made.decision
        running = next((score for score in decision.candidates if score.configuration == decision.current), None)
        if running is None or not running.step_seconds:
            return decision
        for score in decision.candidates:
            # The planner thinks of a move only to what it may choose.
            if score.step_seconds and score.move_seconds is not None:
                self._predict(score, running)
        chosen = next((score for score in decision.candidates if score.configuration == decision.chosen), None)
        if not self._steps and chosen is not None and chosen.step_seconds:
            self._predict(running, chosen)  # the job file's configuration, which the planner leaves before any step
        return decision

    def _predict(self, score: CandidateScore, beside: CandidateScore) -> None:
        """Keep the newest prediction of a configuration that is sure enough to compare with many others, and the time
        it was made beside; of the first configuration the surest one."""
        assert beside.step_seconds, "a prediction"
        first = self._numbers.get(score.configuration) == 0
        before = self._scores.get(score.configuration)
        surest = first and (before is None or _log_error(score) <= _log_error(before[2]))
        if surest or _log_error(score) <= WIDEST:
            self._scores[score.configuration] = (beside.configuration, beside.step_seconds, score)

    def _change(self, after: Configuration, made: Decision | None) -> None:
        """What runs from here on, and the decision that wanted it for a time that it expected."""
        self._check()
        self._running, self._since_change = after, 0
        self._numbers.setdefault(after, len(self._numbers))
        scores = {score.configuration: score for score in made.candidates if score.step_seconds} if made else {}
        self._expected = scores.get(after)
        before = scores.get(made.current) if made else None
        self._drift = 1.0  # of the machine since it was as the planner took it to be
        if before is not None and before.step_seconds and len(self._seen) >= FEWEST_STEPS:
            self._drift = median(self._seen[-RECENT_STEPS:]) / before.step_seconds
        self._seen = []

    def _check(self) -> None:
        """The prediction of what ran until now."""
        if self._expected is not None and len(self._seen) >= FEWEST_STEPS:
            self.outcomes.append(Outcome(self._expected, median(self._seen) / self._drift))
        self._expected = None

    def _step(self, event: Step) -> None:
        if self._running is None:
            return
        self._since_change += 1
        settled = self._since_change > SETTLING_STEPS and event.global_batch == self._running.global_batch
        row = (self._numbers[self._running], event.global_batch, event.seconds, event.time, settled)
        self._steps.append(row)
        if settled:
            self._seen.append(event.seconds)

    def past_run(self) -> PastRun | None:
        """As arrays, for hindsight; None without a step."""
        if not self._steps:
            return None
        configuration, batch, seconds, at, settled = (np.array(column) for column in zip(*self._steps, strict=True))
        ran = set(np.unique(configuration[settled]).tolist())
        predicted = dict[int, PredictedTime]()
        for candidate, (beside, beside_seconds, score) in self._scores.items():
            number = self._numbers.setdefault(candidate, len(self._numbers))
            if number not in ran:
                ratio = math.log((score.step_seconds or 1.0) / beside_seconds)
                other = self._numbers.setdefault(beside, len(self._numbers))
                predicted[number] = PredictedTime(other, ratio, _log_error(score))
        noise = np.array(self._noise).reshape(-1, 3)
        decision = self._newest
        return PastRun(
            configurations=list(self._numbers),
            configuration=configuration,
            batch=batch.astype(float),
            seconds=seconds,
            at=at,
            settled=settled,
            noise_samples=noise[:, 0],
            noise_log=noise[:, 1],
            noise_error=noise[:, 2],
            factor=decision.critical_batch_factor if decision else PlannerConfig().critical_batch_factor,
            factor_error=_factor_error(decision),
            objective=decision.objective if decision else "plain",
            lost_seconds=self._lost,
            move_seconds=self._move_seconds(),
            predicted=predicted,
        )

    def _move_seconds(self) -> Floats:
        """Cost of a new batch, micro-batch, layout: medians of the run's own moves, else as its planner expected."""
        costs = dict.fromkeys(RUNGS, 0.0)
        for beside, _, score in self._scores.values():
            costs[rung_of(beside, score.configuration)] = score.move_seconds or 0.0
        costs |= {rung: median(seconds) for rung, seconds in self._moves.items()}
        return np.maximum.accumulate(np.array([costs[rung] for rung in RUNGS]))
