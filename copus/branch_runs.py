"""Runs the branches of a calibration, one after the other in the same processes."""

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from copus.backends.base import Backend
from copus.backends.step_contract import Batches
from copus.branches import Branches, branch_job
from copus.checkpoints.store import read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.events import Branch, End, Evaluate, Event, read_events
from copus.job import JobConfig, JobError
from copus.learning_rate import base_lr
from copus.loop import Trainer
from copus.noise.run_noise import RunNoise
from copus.schedule import rules_at
from planner.sampling import half_life
from profiles.configuration import Configuration


def run_branches(
    job: JobConfig,
    run: Path,
    branches: Branches,
    backend: Backend,
    open_data: Callable[[JobConfig], tuple[Batches, Batches]],
    report: Callable[[Event], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Train every branch that `run` has no event of yet, and report its losses; collective.

    Each begins with the weights and the optimizer state of the checkpoint and with the learning rate that the run had
    there, held constant. Orders of the data are in the outer loop, so that a calibration that is stopped has whole
    orders. Raises JobError if the learning rate is 0 at the checkpoint.
    """
    started = time.monotonic()
    state, _ = read_state(branches.checkpoint)
    seq_len = job.model.seq_len
    lr = base_lr(job, state.samples_consumed * seq_len)
    if lr <= 0:
        raise JobError(f"{branches.checkpoint.name}: the learning rate is 0 here: every batch would learn nothing")
    noise = RunNoise(half_life(job.planner, job.total_samples, seq_len))
    noise.restore(state.noise)
    done = _done(run, branches)
    total = len(branches.seeds) * len(branches.configurations)
    for seed in branches.seeds:
        branch = branch_job(job, state.samples_consumed, branches.sequences, lr, seed)
        train, valid = open_data(branch)
        for configuration in branches.configurations:
            if (configuration, seed) in done:
                continue
            _go_back(backend, configuration, branches.checkpoint, state.optimizer_steps)
            begin = TrainerState(
                samples_consumed=state.samples_consumed,
                optimizer_steps=state.optimizer_steps,
                beta2_product=state.beta2_product,
            )
            losses = _train(branch, run, backend, train, valid, begin, stop_requested)
            if losses is None:
                report(End(**state.here, reason="interrupted", seconds=time.monotonic() - started))
                return
            done.add((configuration, seed))
            report(
                Branch(
                    **state.here,
                    done=len(done),
                    total=total,
                    configuration=configuration,
                    seed=seed,
                    sequences=branches.sequences,
                    lr=rules_at(branch, begin, configuration.global_batch).lr,
                    first_loss=losses[0],
                    last_loss=losses[-1],
                    noise=noise.estimate(),
                )
            )
    report(End(**state.here, reason="finished", seconds=time.monotonic() - started))


def _go_back(backend: Backend, configuration: Configuration, checkpoint: Path, optimizer_steps: int) -> None:
    """Put the backend where the branches begin; another batch of the same layout needs no new model."""
    if backend.is_built:
        backend.move(configuration)
    else:
        backend.build(configuration)
    backend.load(checkpoint, optimizer_steps)


def _train(
    branch: JobConfig,
    run: Path,
    backend: Backend,
    train: Batches,
    valid: Batches,
    begin: TrainerState,
    stop_requested: Callable[[], bool],
) -> list[float | None] | None:
    """Train one branch; its validation losses, first to last, or None if it was interrupted."""
    events: list[Event] = []
    trainer = Trainer(branch, run, backend, train, valid, None, begin, events.append, stop_requested, keep_nothing=True)
    if trainer.train() == "interrupted":
        return None
    return [event.loss for event in events if isinstance(event, Evaluate)]


def _done(run: Path, branches: Branches) -> set[tuple[Configuration, int]]:
    """Branches of this plan that were run already, as rank 0 finds them."""
    box: list[set[tuple[Configuration, int]]] = [set()]
    if dist.get_rank() == 0:
        finished = [event for event in read_events(run) if isinstance(event, Branch)]
        box[0] = {
            (event.configuration, event.seed)
            for event in finished
            if event.sequences == branches.sequences
            and event.seed in branches.seeds
            and event.configuration in branches.configurations
        }
    dist.broadcast_object_list(box)
    return box[0]
