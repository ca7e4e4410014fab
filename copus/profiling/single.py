"""The profiler that needs one accelerator: a rank's shard of the model runs by itself, in a world that answers at once.

The framework builds the very layers, buffers and schedule that this rank would have among all of them; only the process
groups are not real (`copus.profiling.solo`). So what is measured is the rank's own work, launches included, and nothing
that it would wait for. The cost model adds that.
"""

import statistics
import time

import torch

from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest, StepRules
from copus.collectives import RankError, is_out_of_memory
from copus.devices import rank_device, wait_for
from copus.hardware import peak_memory_bytes, reset_peak_memory
from copus.job import JobConfig
from copus.profiling.solo import world_of_one
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import OUT_OF_MEMORY, Measurement
from profiles.profiler import Processes, Task
from profiles.throughput import half_spread


class SingleProfiler:
    """Times a rank of the first and of the last pipeline stage of each configuration, and keeps the slower one: those
    two differ from the rest, one has the embedding, the other the output layer. Options: none."""

    processes: Processes = "one"
    shards = True

    def __init__(self, task: Task) -> None:
        """Raises ValueError if it is given options."""
        if task.config.options:
            raise ValueError(f"the single profiler takes none, got {', '.join(task.config.options)}")
        self._task = task
        self._job: JobConfig = task.job

    def measure(self, configuration: Configuration) -> Measurement:
        """Seconds that a step of this configuration keeps the busier of those ranks busy, or its lack of memory."""
        reset_peak_memory()
        slowest: list[float] = []
        failure = None
        try:
            for rank in stage_ranks(configuration.layout):
                seconds = self._time_rank(configuration, rank)
                if not slowest or statistics.median(seconds) > statistics.median(slowest):
                    slowest = seconds
        except (RankError, RuntimeError, MemoryError) as error:
            if not (error.out_of_memory if isinstance(error, RankError) else is_out_of_memory(error)):
                raise
            failure = OUT_OF_MEMORY
        return Measurement(
            fingerprint=self._task.fingerprint,
            model=self._task.model,
            configuration=configuration,
            step_seconds=None if failure else statistics.median(slowest),
            spread_seconds=None if failure else half_spread(slowest),
            count=0 if failure else len(slowest),
            peak_bytes=peak_memory_bytes(),
            failure=failure,
            shard=True,
            time=time.time(),
        )

    def _time_rank(self, configuration: Configuration, rank: int) -> list[float]:
        rules = StepRules(lr=0.0, betas=(0.9, 0.95))  # weights stay what they are
        device = rank_device(0, 1)
        with world_of_one(configuration.layout.accelerators, rank):
            backend = find_backend(self._job.training.backend).load()(self._job, device)
            try:
                backend.build(configuration)
                seconds = []
                for _ in range(self._task.config.warmup_steps + self._task.config.steps):
                    started = time.perf_counter()
                    backend.train_step(self._batches, StepRequest(0, rules))
                    wait_for(device)
                    seconds.append(time.perf_counter() - started)
            finally:
                backend.close()
        return seconds[self._task.config.warmup_steps :]

    def _batches(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Any tokens will do: there may be no data here."""
        generator = torch.Generator().manual_seed(first)
        tokens = torch.randint(self._job.model.vocab, (count, self._job.model.seq_len + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def stage_ranks(layout: Layout) -> list[int]:
    """A rank of the first and one of the last pipeline stage (stages are outermost); one if there is one stage."""
    return [0] if layout.pp == 1 else [0, layout.accelerators - 1]
