"""How the gradient noise is sampled: which source a step is measured from, and how long its averages remember."""

from dataclasses import dataclass

from planner.config import PlannerConfig
from planner.space import noise_measurable
from profiles.configuration import Configuration

SHARE_OF_JOB = 0.02
"""Half-life of the averages unless the job file says another: within this share of a job the noise scale hardly
changes."""
STEPS = 100
"""No half-life of that kind is shorter, in optimizer steps: a quarter of these are measured by default, which tells
the noise scale to some 10 %."""
FEWEST_STEPS = 20
"""Nor is one from the job file shorter than this: there would be too few steps to tell anything."""


@dataclass(frozen=True)
class HalfLife:
    """In how long a measured step comes to weigh half as much in the averages of |G|² and tr Σ.

    It has two sides because the batch changes: `samples` sequences, but never fewer than `steps` optimizer steps.
    """

    samples: float
    steps: int

    def at(self, global_batch: int) -> float:
        """In sequences, at that batch."""
        return max(self.samples, float(self.steps * global_batch))


def half_life(settings: PlannerConfig, total_samples: int, seq_len: int) -> HalfLife:
    """The half-life of a job of so many sequences."""
    if settings.noise_half_life_tokens is None:
        return HalfLife(SHARE_OF_JOB * total_samples, STEPS)
    return HalfLife(settings.noise_half_life_tokens / seq_len, FEWEST_STEPS)


def check_measurable(settings: PlannerConfig, start: Configuration) -> None:
    """Raise ValueError if the policy needs the noise scale, and no step of the first configuration can show any."""
    if not settings.needs_noise_scale or noise_measurable(start, settings.noise_source):
        return
    if settings.noise_source == "replica":
        why = f"noise_source(replica) compares data parallel replicas, and training.layout.dp is {start.layout.dp}"
        remedy = "another noise_source"
    else:
        why = (
            f"the noise scale is measured from parts of a step, and a step of {start.global_batch} is one micro-batch "
            f"on one replica, training.micro_batch({start.micro_batch}), which is not even and cannot be halved"
        )
        remedy = "a larger training.global_batch"
    raise ValueError(
        f"{why}: policy({settings.policy}) would never know enough to decide; set {remedy}, or policy: static"
    )


def too_short(settings: PlannerConfig, start: Configuration, total_samples: int) -> str | None:
    """Why a job of so many sequences ends before the first decision that knows the noise scale, in one line; None if
    it does not, or if the policy does not need it."""
    steps = first_known_step(settings)
    needed = steps * start.global_batch
    if not settings.needs_noise_scale or needed < total_samples:
        return None
    return (
        f"planner: nothing will be decided: the noise scale is known after {steps} steps × training.global_batch"
        f"({start.global_batch}) = {needed} sequences, and the job has {total_samples}"
    )


def first_known_step(settings: PlannerConfig) -> int:
    """Steps of a run after which the noise scale may be known: the first ones are all measured, but nothing can be
    divided by Adam's √v̂ before its first step."""
    return settings.min_noise_samples + (settings.noise_metric == "adam")


def source_of_step(settings: PlannerConfig, configuration: Configuration, step: int) -> str | None:
    """The source of step number `step` (0 is the first), as `planner.noise_source` wants it.

    Steps are sampled; between samples the replicas' gradients are compared where there is more than one. A step of one
    micro-batch has no parts: there the norm layers are measured, and on a few steps the micro-batch is halved, which is
    what they are calibrated with. The first steps of a run are all measured in full: nothing can be decided before
    there is an estimate, and they are few.
    """
    if settings.noise_source in ("microbatch", "replica"):
        return settings.noise_source
    first = step < settings.min_noise_samples
    sampled = first or step % settings.noise_every_steps == 0
    if settings.noise_source == "normlayer" or configuration.parts == 1:
        if first or step % settings.noise_halve_every_steps == 0:
            return "microbatch+normlayer"
        return "normlayer" if sampled else None
    if sampled:
        return "microbatch+normlayer"
    return "replica" if configuration.layout.dp > 1 else None


def halved_share(settings: PlannerConfig, configuration: Configuration) -> float:
    """Share of its steps that are run as two halves to be measured, later than the first ones of a run: of a lone
    micro-batch, which is even."""
    if configuration.parts > 1 or configuration.micro_batch % 2 or settings.noise_source == "replica":
        return 0.0
    return 1.0 if settings.noise_source == "microbatch" else 1 / settings.noise_halve_every_steps


def typical_configuration(settings: PlannerConfig, configuration: Configuration) -> Configuration:
    """The configuration that most of its steps execute, and are timed as."""
    return configuration.halved if halved_share(settings, configuration) > 0.5 else configuration


def executed_configuration(configuration: Configuration, source: str | None) -> Configuration:
    """The configuration that a step with this noise source executes: a lone micro-batch is halved if micro-batches
    are to be compared, and its size is even. The gradient is the same, and has parts."""
    compares_microbatches = source is not None and "microbatch" in source.split("+")
    return configuration.halved if compares_microbatches and configuration.parts == 1 else configuration
