"""A run that keeps one layout and one micro-batch, as all tools but this one have it: the best one for a whole job."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from copus.job import JobConfig, JobError
from copus.optimizers import AdamW
from launch.arguments.batch_steps import BatchSteps
from launch.recommendation import STAGES
from profiles.configuration import Configuration
from profiles.formatting import percent
from profiles.layout import Layout

if TYPE_CHECKING:  # numpy and scipy are loaded when the command runs
    import numpy as np
    from numpy.typing import NDArray

    from planner.forecast import CriticalBatchForecast
    from planner.job_estimate import JobEstimate
    from planner.predictor import CandidateEstimate


@dataclass(frozen=True)
class FixedRun:
    """A layout, a micro-batch, global batches, and the optimizer's values for them."""

    layout: Layout
    """The layout of the whole run."""
    micro_batch: int
    """The micro-batch of the whole run, in sequences."""
    batches: BatchSteps
    """Global batches; one, if the tool has no schedule."""
    main_batch: int
    """The one that the optimizer's values are for: a ramp's last, or else that of most sequences."""
    lr: float
    """Peak learning rate, at that batch."""
    min_lr: float
    """Learning rate at the end of the decay, at that batch."""
    betas: tuple[float, float]
    """Adam's β1 and β2 at that batch."""
    epsilon: float
    """Adam's ε."""
    weight_decay: float
    """Decoupled weight decay at that batch."""
    notes: tuple[str, ...] = ()
    """Why it is this one, and what it costs not to move."""

    @property
    def configurations(self) -> list[Configuration]:
        """What runs, one after the other."""
        return [
            Configuration(layout=self.layout, micro_batch=self.micro_batch, global_batch=batch)
            for _, batch in self.batches.steps
        ]


def as_written(job: JobConfig) -> FixedRun:
    """The run as the job file has it: its configuration, and its ramp if the policy is `ramp`."""
    training, config, batch = job.training, job.planner, job.training.global_batch
    batches, notes = BatchSteps.constant(batch), list[str]()
    if config.policy == "ramp":
        length = config.ramp_samples or job.total_samples // 2
        largest = config.max_global_batch - (config.max_global_batch - config.ramp_start) % config.ramp_increment
        if largest > config.ramp_start:
            batches = BatchSteps.ramp(config.ramp_start, config.ramp_increment, length, largest)
    elif config.policy not in ("static", "goodput", "copus"):
        notes.append(f"planner.policy({config.policy}) is nothing that another tool has: the batch stays at {batch}")
    return _with_values(job, training.layout, training.micro_batch, batches, batch, math.inf, notes)


def at_configuration(
    job: JobConfig, configuration: Configuration, critical_batch: float | None, notes: list[str]
) -> FixedRun:
    """A run that stays in one configuration, with the optimizer's values for its batch at this critical batch."""
    batch = configuration.global_batch
    phi = math.inf if critical_batch is None else critical_batch
    steps = BatchSteps.constant(batch)
    return _with_values(job, configuration.layout, configuration.micro_batch, steps, batch, phi, notes)


def best_fixed_run(job: JobConfig, estimate: "JobEstimate", *, schedule: bool) -> FixedRun:
    """The layout and micro-batch that reach the end of the job first, if φ grows as published laws say; with a batch
    that grows in powers of two if the tool has a `schedule`, else with the best one batch.

    A policy that does not follow the noise scale has the run as it is written.
    """
    if job.planner.policy not in ("goodput", "copus"):
        return as_written(job)
    from planner.forecast import CriticalBatchForecast

    laws = CriticalBatchForecast.of_laws(job.total_samples, job.model)
    return best_fixed_run_for(job, estimate, laws, 0, schedule=schedule)


def best_fixed_run_for(
    job: JobConfig, estimate: "JobEstimate", forecast: "CriticalBatchForecast", done: int, *, schedule: bool
) -> FixedRun:
    """The same for the rest of a job after `done` sequences, for what is expected of φ. Places of the schedule count
    from the beginning of the job."""
    import numpy as np

    from planner.goodput import progress_per_sample

    able = estimate.eligible
    if not able:
        return as_written(job)
    places = done + (np.arange(STAGES) + 0.5) / STAGES * (job.total_samples - done)
    phi = forecast.at(places)
    batch = np.array([candidate.configuration.global_batch for candidate in able], float)
    rate = np.array([candidate.samples_per_second for candidate in able], float)
    # Seconds for a stage's progress, in every stage and candidate: the same progress for all.
    seconds = 1 / (rate * progress_per_sample(batch, phi[:, None], job.planner.objective))
    groups: dict[tuple[Layout, int], list[int]] = {}
    for index, candidate in enumerate(able):
        groups.setdefault((candidate.configuration.layout, candidate.configuration.micro_batch), []).append(index)
    chosen, total = list[int](), math.inf
    for members in groups.values():
        picked = _growing(seconds[:, members], batch[members]) if schedule else _constant(seconds[:, members])
        time = float(sum(seconds[stage, members[member]] for stage, member in enumerate(picked)))
        if time < total:
            chosen, total = [members[member] for member in picked], time
    starts = done + np.arange(STAGES) * (job.total_samples - done) / STAGES
    steps = [(0 if not stage else int(starts[stage]), int(batch[index])) for stage, index in enumerate(chosen)]
    changes = [steps[0], *(after for before, after in pairwise(steps) if after[1] != before[1])]
    configuration = able[chosen[0]].configuration
    free = float(seconds.min(axis=1).sum())
    notes = [f"the best layout and micro-batch for the whole run; {_beside(able, chosen, estimate.start)}"]
    if total > 1.005 * free:
        notes.append(
            f"a run that moves between layouts and batches is expected to be {percent(1 - free / total)} sooner"
        )
    batches = BatchSteps(tuple(changes))
    main_batch = max(chosen, key=chosen.count)
    at_main = float(phi[chosen.index(main_batch)])
    layout, micro_batch = configuration.layout, configuration.micro_batch
    return _with_values(job, layout, micro_batch, batches, int(batch[main_batch]), at_main, notes)


def _constant(seconds: "NDArray[np.float64]") -> list[int]:
    """The candidate that is best over all stages, for each of them."""
    return [int(seconds.sum(axis=0).argmin())] * len(seconds)


def _growing(seconds: "NDArray[np.float64]", batch: "NDArray[np.float64]") -> list[int]:
    """The best candidate of each stage whose batch is no smaller than that of the stage before."""
    picked: list[int] = []
    for row in seconds:
        allowed = [index for index in range(len(row)) if not picked or batch[index] >= batch[picked[-1]]]
        picked.append(min(allowed, key=lambda index: float(row[index])))
    return picked


def _beside(able: "list[CandidateEstimate]", chosen: list[int], start: "CandidateEstimate") -> str:
    first = able[chosen[0]]
    if first.configuration == start.configuration or not start.samples_per_second or not first.samples_per_second:
        return "that of the job file" if first.configuration == start.configuration else first.source
    ratio = first.samples_per_second / start.samples_per_second
    return f"×{ratio:.2f} the throughput of the job file's in the beginning, {first.source}"


def _with_values(
    job: JobConfig,
    layout: Layout,
    micro_batch: int,
    batches: BatchSteps,
    main_batch: int,
    critical_batch: float,
    notes: list[str],
) -> FixedRun:
    """The run with the optimizer's values for its main batch, by the rules of the job (`copus.schedule`). Raises
    JobError for an optimizer that is written for no other tool."""
    training, optimizer = job.training, job.training.optimizer
    if type(optimizer) is not AdamW:
        raise JobError(f"training.optimizer.kind({optimizer.kind}): only adamw is written as another tool's arguments")
    capped = math.inf if optimizer.scale_beyond_critical_batch else max(critical_batch, job.reference_batch)
    kappa = min(main_batch, capped) / job.reference_batch
    factor = optimizer.lr_factor(kappa)
    if kappa != 1:
        notes = [*notes, f"learning rate, β2 and weight decay are those of a batch of {main_batch}, by the job's rules"]
    beta1, beta2 = optimizer.betas_at(kappa)
    return FixedRun(
        layout=layout,
        micro_batch=micro_batch,
        batches=batches,
        main_batch=main_batch,
        lr=_rounded(training.lr * factor),
        min_lr=_rounded(min(training.min_lr, training.lr) * factor),  # a constant one may be below the default
        betas=(_rounded(beta1), _rounded(beta2)),
        epsilon=optimizer.epsilon,
        weight_decay=_rounded(optimizer.weight_decay_at(kappa)),
        notes=tuple(notes),
    )


def _rounded(value: float) -> float:
    """To nine digits: nobody wants to paste 0.00021213203435596424."""
    return float(f"{value:.9g}")
