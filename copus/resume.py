"""Where a run goes on: from the newest checkpoint that verifies, in a configuration that today's ranks can run."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from copus.backends.base import Backend
from copus.checkpoints.files import set_damaged_aside
from copus.checkpoints.store import newest_checkpoint, read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import broadcast_from_rank0
from copus.events import Event, Failure, Warned, has_checkpoint
from copus.job import JobConfig
from copus.resize import fits, fitting
from copus.resume_request import ResumeRequest, nothing_to_resume
from copus.weights.saved import begin
from profiles.throughput import Throughput


def newest_that_verifies(run: Path, request: ResumeRequest, report: Callable[[Event], None]) -> Path | None:
    """The newest checkpoint that verifies; those that do not are set aside. Collective.

    Raises JobError if the run had checkpoints and none verifies, unless the user said that it may begin again.
    """
    flaws: list[str] = []
    newest = newest_checkpoint(run, flaws.append)
    if newest is None and not request.may_begin_again and broadcast_from_rank0(has_checkpoint(run)):
        raise nothing_to_resume(run, flaws)
    for line in flaws:
        _skipped(line, report)
    if dist.get_rank() == 0:
        set_damaged_aside(run, None if newest is None else newest.name)
    return newest


def build_or_resume(
    job: JobConfig,
    newest: Path | None,
    backend: Backend,
    throughput: Throughput,
    request: ResumeRequest | None = None,
    report: Callable[[Event], None] = lambda event: None,
) -> TrainerState:
    """Start, or go on where the checkpoint was made, on whatever ranks there are now: in the configuration that the
    user asked for, if any, else in the checkpoint's. `throughput` counts on rank 0."""
    if newest is None:
        return begin(job, backend)
    state, saved = read_state(newest)
    seen = throughput.predict(saved)
    infeasible = broadcast_from_rank0(seen is not None and seen.failure is not None)
    target = saved
    if request and request.configuration and state.samples_consumed <= request.until_samples:
        target, infeasible = request.configuration, False
    wanted = target.global_batch
    if infeasible or not fits(target.layout, job, job.cluster):
        target = broadcast_from_rank0(fitting(target, job, job.cluster, throughput.predict))
    if target.global_batch != wanted:
        message = (
            f"{job.cluster.accelerators} ranks cannot share a global batch of {wanted} evenly: it is "
            f"{target.global_batch} now. On other ranks, --resume --set training.global_batch={wanted} goes back to it"
        )
        report(Warned(**state.here, message=message))
    backend.build(target, initial_weights=False)
    backend.load(newest, state.optimizer_steps)
    return state


def _skipped(line: str, report: Callable[[Event], None]) -> None:
    """Say which checkpoint was passed over, and why."""
    if dist.get_rank() == 0:
        print(f"copus: {line}", file=sys.stderr, flush=True)
    report(Failure(step=0, samples_consumed=0, rank=0, message=line, fatal=False))
