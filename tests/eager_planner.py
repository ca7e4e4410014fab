"""A planner that wants one and the same move at every decision, unless the throughput says that it cannot run."""

import math
from typing import Any

import copus.moves
import planner.decision_times
from copus.job import JobConfig
from planner.planner import Planner
from planner.predictor import Predictor
from planner.trials import Trial
from profiles.configuration import Configuration
from profiles.decision import Decision
from profiles.throughput import Throughput


def decide_often() -> None:
    """In this process decisions fall due with `every_samples` alone, so that short runs have some, and the same ones
    whatever a decision takes on a busy machine."""
    planner.decision_times.FEWEST_STEPS_BETWEEN, copus.moves.DECIDING_SHARE = 1, math.inf


class EagerPlanner:
    """Stands for `planner.planner.Planner` in a trainer."""

    def __init__(self, job: JobConfig, after: Configuration, break_even: float | None = None) -> None:
        """With a `break_even`, every move is a trial, judged by this ratio of step times."""
        self.throughput = Throughput()
        start, precision = job.training.configuration, job.training.precision
        predictor = Predictor(job.planner, job.model, job.cluster, precision, start, self.throughput)
        self.real = Planner(predictor)
        self._after = after
        self._break_even = break_even

    def __getattr__(self, name: str) -> Any:
        """Whatever is not about choosing."""
        return getattr(self.real, name)

    def decide(self, noise: Any, current: Configuration, samples_consumed: int, *more: Any) -> Any:
        """The real decision, but for what it chooses."""
        decision = self.real.decide(noise, current, samples_consumed, *more)
        known = self.throughput.predict(self._after)
        if known and known.failure:
            return decision
        if self.trials.tried(self._after):
            return decision.model_copy(update={"chosen": current})
        return decision.model_copy(update={"chosen": self._after, "trial": self._break_even is not None})

    def begin_trial(self, decision: Decision) -> Trial:
        """The trial, judged by the ratio that the test wants."""
        assert self._break_even is not None
        self.real._trial = Trial(
            decision.number, decision.chosen, decision.current, self.trials.recent, self._break_even
        )
        return self.real._trial
