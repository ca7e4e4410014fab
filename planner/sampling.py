"""How the gradient noise is sampled: which source a step is measured from, and how long its averages remember."""

from dataclasses import dataclass

from planner.backend_traits import BackendTraits, PartCount
from planner.config import PlannerConfig
from planner.noise_sources import MICROBATCH, NORMLAYER, REPLICA, split
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


def noise_measurable(settings: PlannerConfig, backend: BackendTraits, configuration: Configuration) -> bool:
    """Whether some step of the configuration has two parts to compare: as it is, as two halves of a lone micro-batch,
    or with a second one."""
    parts = backend.parts(configuration)
    if settings.noise_source == "replica" or MICROBATCH not in parts:
        return settings.noise_source in ("auto", "replica") and _comparable(parts, REPLICA)
    if settings.noise_source == "normlayer" and NORMLAYER not in parts:
        return False
    return (
        _comparable(parts, MICROBATCH)
        or _can_halve(backend, configuration)
        or _needs_a_second(settings, backend, configuration)
    )


def check_measurable(settings: PlannerConfig, backend: BackendTraits, start: Configuration) -> None:
    """Raise ValueError if no step of the first configuration can measure the noise scale, and the policy needs it, or
    the job names a source that the layout will never have."""
    names_source = settings.noise_source != "auto" and settings.keeps_layout
    if not (settings.needs_noise_scale or names_source) or noise_measurable(settings, backend, start):
        return
    parts = backend.parts(start)
    if settings.noise_source not in ("auto", *parts):
        measured = ", ".join(parts) or "nothing"
        why = f"noise_source({settings.noise_source}): with {start.label} this backend measures {measured}"
        remedy = "another noise_source"
    elif settings.noise_source == "replica":
        why = f"noise_source(replica) compares data parallel replicas, and training.layout.dp is {start.layout.dp}"
        remedy = "another noise_source"
    else:
        why = (
            f"the noise scale is measured from parts of a step, and a step of {start.global_batch} is one micro-batch "
            f"on one replica, training.micro_batch({start.micro_batch}), which is not even and cannot be halved"
        )
        remedy = "a larger training.global_batch"
    if not settings.needs_noise_scale:
        raise ValueError(f"{why}: the noise scale would never be known; set {remedy}")
    raise ValueError(
        f"{why}: policy({settings.policy}) would never know enough to decide; set {remedy}, or policy: static"
    )


def too_short(settings: PlannerConfig, start: Configuration, total_samples: int) -> str | None:
    """Why a job of so many sequences ends before the first decision that knows the noise scale, in one line; None if
    it does not, or if the policy does not wait for it."""
    steps = first_known_step(settings)
    needed = steps * start.global_batch
    if not settings.waits_for_noise_scale or needed < total_samples:
        return None
    return (
        f"planner: nothing will be decided: the noise scale is known after {steps} steps × training.global_batch"
        f"({start.global_batch}) = {needed} sequences, and the job has {total_samples}"
    )


def first_known_step(settings: PlannerConfig) -> int:
    """Steps of a run after which the noise scale may be known: the first ones are all measured, but nothing can be
    divided by Adam's √v̂ before its first step."""
    return settings.min_noise_samples + (settings.noise_metric == "adam")


def source_of_step(
    settings: PlannerConfig, backend: BackendTraits, configuration: Configuration, step: int
) -> str | None:
    """The noise source of step number `step` (0 is the first), by `planner.noise_source`; None to measure nothing.

    With `auto`, one step in `noise_every_steps` compares micro-batches, and the steps between compare replicas, if
    there are any, which is cheaper. A lone micro-batch has nothing to be compared with: the norm layers are measured
    instead, and on a few steps the micro-batch is halved, to calibrate them. All of the first steps of a run are
    measured in full, because nothing can be decided before there is an estimate. The paper's norm test compares
    replicas on every step. Sources that the backend does not have are left out.
    """
    parts = backend.parts(configuration)
    if settings.noise_source in ("microbatch", "replica"):
        return _joined(parts, settings.noise_source)
    if settings.compares_workers and _comparable(parts, REPLICA):
        return REPLICA
    first, sampled = step < settings.min_noise_samples, is_sampled(settings, step)
    lone = MICROBATCH in parts and not _comparable(parts, MICROBATCH)
    if settings.noise_source == "normlayer" or lone:
        if first or step % settings.noise_halve_every_steps == 0:
            return _joined(parts, MICROBATCH, NORMLAYER)
        return _joined(parts, NORMLAYER) if sampled else None
    if sampled and MICROBATCH in parts:
        return _joined(parts, MICROBATCH, NORMLAYER)
    return REPLICA if _comparable(parts, REPLICA) else None


def configuration_of_step(
    settings: PlannerConfig, backend: BackendTraits, configuration: Configuration, step: int
) -> Configuration:
    """What step number `step` runs in. A lone micro-batch that cannot be halved, such as a batch of one sequence, has
    no parts to be compared. Where the policy decides by the noise scale, sampled steps therefore take a second
    micro-batch from the same weights, and are as unbiased as any: parts of successive steps would not be
    (docs/small-batch.md)."""
    if settings.needs_noise_scale and is_sampled(settings, step) and _needs_a_second(settings, backend, configuration):
        return _with_a_second(configuration)
    return configuration


def halved_share(settings: PlannerConfig, backend: BackendTraits, configuration: Configuration) -> float:
    """Share of the steps, after the first ones of a run, that execute a lone micro-batch as two halves."""
    parts = backend.parts(configuration)
    if settings.noise_source == "replica" or _comparable(parts, MICROBATCH) or not _can_halve(backend, configuration):
        return 0.0
    return 1.0 if settings.noise_source == "microbatch" else 1 / settings.noise_halve_every_steps


def typical_configuration(
    settings: PlannerConfig, backend: BackendTraits, configuration: Configuration
) -> Configuration:
    """The configuration that most of its steps execute, and are timed as."""
    return configuration.halved if halved_share(settings, backend, configuration) > 0.5 else configuration


def executed_configuration(backend: BackendTraits, configuration: Configuration, source: str | None) -> Configuration:
    """The configuration that a step with this noise source executes. A lone micro-batch is run as two halves if
    micro-batches are to be compared: the gradient is the same, and has two parts."""
    full, _ = split(source)
    lone = full == MICROBATCH and not _comparable(backend.parts(configuration), MICROBATCH)
    return configuration.halved if lone and _can_halve(backend, configuration) else configuration


def measured_configuration(
    settings: PlannerConfig, backend: BackendTraits, configuration: Configuration
) -> Configuration:
    """What the first step of a run in the configuration executes, in which everything is measured that ever is."""
    taken = configuration_of_step(settings, backend, configuration, 0)
    return executed_configuration(backend, taken, source_of_step(settings, backend, taken, 0))


def _comparable(parts: dict[str, PartCount], source: str) -> bool:
    return source in parts and parts[source].number > 1


def _can_halve(backend: BackendTraits, configuration: Configuration) -> bool:
    """Whether two halves of the micro-batch make the micro-batches comparable."""
    return configuration.micro_batch % 2 == 0 and _comparable(backend.parts(configuration.halved), MICROBATCH)


def _needs_a_second(settings: PlannerConfig, backend: BackendTraits, configuration: Configuration) -> bool:
    """Whether only a second micro-batch makes the micro-batches comparable. The norm test looks at |ḡ|² of steps of the
    batch that it judges, which such a step does not have."""
    return (
        settings.policy != "norm-test"
        and not _comparable(backend.parts(configuration), MICROBATCH)
        and not _can_halve(backend, configuration)
        and _comparable(backend.parts(_with_a_second(configuration)), MICROBATCH)
    )


def _with_a_second(configuration: Configuration) -> Configuration:
    """The configuration with twice as many micro-batches."""
    return configuration.model_copy(update={"global_batch": 2 * configuration.global_batch})


def is_sampled(settings: PlannerConfig, step: int) -> bool:
    """Whether micro-batches, or norm layers, are measured in a step: all of the first ones of a run, then some."""
    return step < settings.min_noise_samples or step % settings.noise_every_steps == 0


def _joined(parts: dict[str, PartCount], *sources: str) -> str | None:
    """The source of a step that measures those of the sources that it has; None if it has none."""
    return "+".join(source for source in sources if source in parts) or None
