"""A planner that wants one and the same move at every decision, unless the throughput says that it cannot run."""

from typing import Any

from copus.job import JobConfig
from planner.planner import Planner
from planner.predictor import Predictor
from profiles.configuration import Configuration
from profiles.throughput import Throughput


class EagerPlanner:
    """Stands for `planner.planner.Planner` in a trainer."""

    def __init__(self, job: JobConfig, after: Configuration) -> None:
        self.throughput = Throughput()
        start, precision = job.training.configuration, job.training.precision
        predictor = Predictor(job.planner, job.model, job.cluster, precision, start, self.throughput)
        self.real = Planner(predictor)
        self._after = after
        self.observe_loss = self.real.observe_loss
        self.move_costs, self.state = self.real.move_costs, self.real.state

    def decide(self, noise: Any, current: Configuration, samples_consumed: int, step_norms: Any = None) -> Any:
        """The real decision, but for what it chooses."""
        decision = self.real.decide(noise, current, samples_consumed, step_norms)
        known = self.throughput.predict(self._after)
        return decision if known and known.failure else decision.model_copy(update={"chosen": self._after})
