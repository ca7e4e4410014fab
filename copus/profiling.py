"""Fills the throughput table before training: runs the configurations that it lacks, in this very job, and times their
steps."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from copus.agreement import RankError
from copus.backends.base import Backend, Batches, StepRules
from copus.events import Profile
from copus.hardware import peak_memory_bytes, reset_peak_memory
from copus.job import JobConfig, JobError
from planner.memory_check import MemoryCheck
from planner.profiling import to_measure
from planner.space import candidates
from profiles.configuration import Configuration
from profiles.measurement import Fingerprint, Measurement
from profiles.table import ThroughputTable
from profiles.throughput import Throughput, half_spread


def profile_missing(
    job: JobConfig,
    backend: Backend,
    batches: Batches,
    report: Callable[[Profile], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Measure what the planner will ask for and the table does not have.

    Collective. Every round goes through all of it, so that a slow moment of the machine hits one round and not one
    layout; every measurement is in the table as soon as it is made, so that an interrupted profile goes on where it
    was. Stops after `profile.budget_seconds`, or when rank 0 is asked to. Leaves the backend in an arbitrary
    configuration with arbitrary weights.
    """
    rank = dist.get_rank()
    table = ThroughputTable(job.profile.table)
    fingerprint = backend.fingerprint()
    plan = _broadcast(_plan(job, table, fingerprint) if rank == 0 else None)
    endless = _endless(batches, job.total_samples)
    deadline = time.monotonic() + job.profile.budget_seconds
    done, total = 0, len(plan) * job.profile.rounds
    for _ in range(job.profile.rounds):
        for configuration in plan:
            if _broadcast(time.monotonic() > deadline or stop_requested()):
                return
            measurement = _measure(job, backend, configuration, endless, fingerprint)
            done += 1
            if measurement.failure is not None and dist.get_world_size() > 1:
                # Its peers wait in a collective that this rank has left: none of them can go on.
                table.add(measurement)
                raise JobError(
                    f"{configuration.label}: {measurement.failure}; noted in {job.profile.table}. "
                    "Start the job again: it will be left out"
                )
            if rank == 0:
                table.add(measurement)
                report(
                    Profile(
                        step=0,
                        samples_consumed=0,
                        configuration=configuration,
                        done=done,
                        total=total,
                        step_seconds=measurement.step_seconds,
                        failure=measurement.failure,
                    )
                )


def _endless(batches: Batches, total: int) -> Batches:
    """The same sequences over and over, so that a short job can be profiled at batches that it will never reach."""

    def read(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels = zip(*(batches((first + offset) % total, 1) for offset in range(count)), strict=True)
        return torch.cat(tokens), torch.cat(labels)

    return read


def _plan(job: JobConfig, table: ThroughputTable, fingerprint: Fingerprint) -> list[Configuration]:
    if job.profile.when == "never":
        return []
    rows = table.rows(fingerprint)
    known = Throughput() if job.profile.when == "always" else Throughput(rows)
    start = job.training.configuration
    space = [start] if job.planner.policy == "static" else candidates(job.planner, job.model, job.cluster, start)
    if job.planner.policy == "norm-test":  # which keeps the layout
        space = [candidate for candidate in space if candidate.layout == start.layout]
    memory = MemoryCheck(job.model, job.cluster, job.training.precision, rows)
    return memory.possible(to_measure(memory.possible(space, start), known, start), start)


def _measure(
    job: JobConfig, backend: Backend, configuration: Configuration, batches: Batches, fingerprint: Fingerprint
) -> Measurement:
    """Median and spread of a few steps, or the failure that came instead."""
    seconds: list[float] = []
    failure = None
    reset_peak_memory()
    try:
        _configure(backend, configuration)
        for index in range(job.profile.warmup_steps + job.profile.steps):
            dist.barrier()
            started = time.perf_counter()
            backend.train_step(batches, 0, StepRules(lr=0.0, betas=job.training.betas), None, False)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= job.profile.warmup_steps:
                seconds.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        failure = "out of memory"
    except RankError as error:
        if not error.out_of_memory:
            raise
        failure = "out of memory"
    peak = torch.tensor(float(peak_memory_bytes() or 0), device=backend.device)
    if failure is None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return Measurement(
        fingerprint=fingerprint,
        model=job.model,
        configuration=configuration,
        step_seconds=None if failure else statistics.median(seconds),
        spread_seconds=None if failure else half_spread(seconds),
        count=0 if failure else len(seconds),
        peak_bytes=int(peak) or None,
        failure=failure,
        time=time.time(),
    )


def _configure(backend: Backend, configuration: Configuration) -> None:
    """Weights do not matter here: within a layout the batch changes alone, and another layout is built afresh."""
    if backend.is_built and backend.configuration.layout == configuration.layout:
        backend.move(configuration)
    else:
        backend.build(configuration)


def _broadcast(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
