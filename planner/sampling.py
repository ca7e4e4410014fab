"""Which source a step is measured from, so that measuring costs little."""

from planner.config import PlannerConfig
from profiles.configuration import Configuration


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
