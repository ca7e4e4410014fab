"""The profiler that needs no launch: the running job goes through the configurations, and its steps are timed."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from copus.backends.base import Backend
from copus.backends.step_contract import Batches, StepRequest, StepRules
from copus.collectives import RankError, broadcast_from_rank0, is_out_of_memory
from copus.devices import wait_for
from copus.events import Profile
from copus.hardware import peak_memory_bytes, reset_peak_memory
from copus.job import JobConfig
from copus.profilers import find_profiler
from copus.profiling.fill import fill_table, load_profiler
from planner.sampling import source_of_step
from profiles.configuration import Configuration
from profiles.measurement import OUT_OF_MEMORY, Measurement
from profiles.profiler import Processes, Task
from profiles.table import ThroughputTable
from profiles.throughput import half_spread


def profile_missing(
    job: JobConfig,
    run: Path,
    backend: Backend,
    batches: Batches,
    report: Callable[[Profile], object],
    stop_requested: Callable[[], bool],
) -> None:
    """Measure what the planner will ask for and the table does not have, with the job's profiler.

    Collective. Does nothing if that profiler needs a single process: then it has run already. Leaves the backend in
    an arbitrary configuration with arbitrary weights.
    """
    if find_profiler(job.profile.profiler).processes == "one":
        return
    task = Task(
        model=job.model,
        cluster=job.cluster,
        fingerprint=backend.fingerprint(),
        config=job.profile,
        backend=backend,
        job=job,
        batches=_endless(batches, job.total_samples),
    )
    leads = dist.get_rank() == 0
    fill_table(job, run, load_profiler(job), task, report, stop_requested, leads, broadcast_from_rank0)


class LiveProfiler:
    """Times steps of the running job; neither a move nor the warm-up steps after it count.

    Of those there are `profile.warmup_steps` after a change of layout or micro-batch, and none if only the number of
    micro-batches changes.

    Options: none.
    """

    processes: Processes = "all"
    shards = False

    def __init__(self, task: Task) -> None:
        """Raises ValueError if it is given options."""
        if task.config.options:
            raise ValueError(f"the live profiler takes none, got {', '.join(task.config.options)}")
        self._task = task
        self._backend: Backend = task.backend

    def measure(self, configuration: Configuration) -> Measurement:
        """Median and spread of a few steps, or the lack of memory that any rank met. Collective.

        All steps are on trial, so that a rank whose memory runs out takes the others out with it, and the next
        configuration is built in the same processes. Only the weights' update is beyond that: if memory runs out there,
        the rank writes it into the table and raises RuntimeError. The workers then start again and leave it out.
        """
        reset_peak_memory()
        seconds: list[float] = []
        try:
            self._configure(configuration)
            seconds = self._time_steps()
        except RankError as error:
            if not error.out_of_memory:
                raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            table = self._task.config.table
            ThroughputTable(table).add(self._measurement(configuration, [], peak_memory_bytes()))
            raise RuntimeError(
                f"{configuration.label}: {OUT_OF_MEMORY}; noted in {table}, and left out from now on"
            ) from None
        if not seconds and self._backend.is_built:  # a step failed; after the except block nothing holds its memory
            self._backend.abandon()
        return self._measurement(configuration, seconds, self._peak())

    def _configure(self, configuration: Configuration) -> None:
        """Within a layout the batch alone changes. Another layout is built afresh in the same processes: weights do not
        matter here, and the old layout's need not be held while the new one's memory is looked at."""
        backend = self._backend
        runs = backend.configuration if backend.is_built else None
        if runs is None or runs.layout != configuration.layout:
            backend.build(configuration)
            reset_peak_memory()  # until now the old layout was there too
        if runs is None or (runs.layout, runs.micro_batch) != (configuration.layout, configuration.micro_batch):
            self._warm_up(configuration)
        backend.move(configuration)

    def _warm_up(self, configuration: Configuration) -> None:
        """Steps as short as they can be: a micro-batch for each pipeline stage. What more of them take is the same."""
        layout = configuration.layout
        batch = min(configuration.global_batch, layout.dp * configuration.micro_batch * layout.pp)
        self._backend.move(configuration.model_copy(update={"global_batch": batch}))
        first_source = source_of_step(self._task.job.planner, self._backend.description, configuration, 0)
        for number in range(self._task.config.warmup_steps):
            # The first step takes the memory of a measured one: the job will need that too.
            self._step(first_source if number == 0 else None)

    def _time_steps(self) -> list[float]:
        seconds = []
        for _ in range(self._task.config.steps):
            dist.barrier()
            started = time.perf_counter()
            self._step()
            wait_for(self._backend.device)
            seconds.append(time.perf_counter() - started)
        return seconds

    def _step(self, noise_source: str | None = None) -> None:
        rules = StepRules(lr=0.0, betas=(0.9, 0.95))  # weights stay what they are
        self._backend.train_step(self._task.batches, StepRequest(0, rules, noise_source, on_trial=True))

    def _peak(self) -> int | None:
        """Most memory of any rank."""
        peak = torch.tensor(float(peak_memory_bytes() or 0), device=self._backend.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return int(peak) or None

    def _measurement(self, configuration: Configuration, seconds: list[float], peak_bytes: int | None) -> Measurement:
        return Measurement(
            fingerprint=self._task.fingerprint,
            model=self._task.model,
            configuration=configuration,
            step_seconds=statistics.median(seconds) if seconds else None,
            spread_seconds=half_spread(seconds) if seconds else None,
            count=len(seconds),
            peak_bytes=peak_bytes,
            failure=None if seconds else OUT_OF_MEMORY,
            time=time.time(),
        )


def _endless(batches: Batches, total: int) -> Batches:
    """The same sequences over and over, so that a short job can be profiled at batches that it will never reach."""

    def read(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels = zip(*(batches((first + offset) % total, 1) for offset in range(count)), strict=True)
        return torch.cat(tokens), torch.cat(labels)

    return read
