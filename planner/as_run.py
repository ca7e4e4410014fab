"""How long a step takes as the job runs it: a lone micro-batch is halved on some or all steps, to measure the noise."""

from planner.config import PlannerConfig
from planner.sampling import halved_share
from profiles.configuration import Configuration
from profiles.throughput import Prediction, Throughput


def runs_as(config: PlannerConfig, configuration: Configuration) -> Configuration:
    """As what most of its steps are run, and timed."""
    return configuration.halved if halved_share(config, configuration) > 0.5 else configuration


def predict_as_run(throughput: Throughput, config: PlannerConfig, configuration: Configuration) -> Prediction | None:
    """The mean duration of its steps, halved ones included; what `Throughput.predict` says where none is halved, where
    the configuration cannot run, or where nothing is known of the halves."""
    whole, share = throughput.predict(configuration), halved_share(config, configuration)
    if not share or whole is None or whole.step_seconds is None:
        return whole
    halves = throughput.predict(configuration.halved)
    if halves is None or halves.step_seconds is None:
        return whole
    mostly = halves if share > 0.5 else whole
    seconds = (1 - share) * whole.step_seconds + share * halves.step_seconds
    longer = seconds / (halves.step_seconds if share > 0.5 else whole.step_seconds)
    spread = None if mostly.spread_seconds is None else mostly.spread_seconds * longer
    seen = whole.memory_seen or (share == 1 and halves.memory_seen)  # then it never runs as a whole
    memory = {"peak_bytes": whole.peak_bytes, "memory_seen": seen}
    return mostly.model_copy(update={"step_seconds": seconds, "spread_seconds": spread, **memory})
