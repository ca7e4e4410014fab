"""Measures with a command of yours: whatever prints the seconds of some steps, one a line, can fill a throughput table.

profile:
  profiler: command
  options:
    command: srun my_benchmark --tp {tp} --pp {pp} --dp {dp} --micro-batch {micro_batch} --global-batch {global_batch}
"""

import shlex
import statistics
import subprocess
import time

from profiles.configuration import Configuration
from profiles.measurement import OUT_OF_MEMORY, Measurement
from profiles.profiler import Processes, Task
from profiles.throughput import half_spread


class CommandProfiler:
    """Runs the command once for every configuration. Options: `command`, with the degrees and batches in braces."""

    processes: Processes = "one"
    shards = False

    def __init__(self, task: Task) -> None:
        """Raises ValueError without a command."""
        self._task = task
        command = task.config.options.get("command")
        if not isinstance(command, str):
            raise ValueError("the command profiler needs `command`, what to run")
        self._command = shlex.split(command)

    def measure(self, configuration: Configuration) -> Measurement:
        """The median of what the command printed, or why there is nothing."""
        values = {**configuration.layout.model_dump(), **configuration.model_dump(exclude={"layout"})}
        command = [part.format(**values) for part in self._command]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            out_of_memory = "out of memory" in done.stderr.lower()
            return self._measurement(configuration, failure=OUT_OF_MEMORY if out_of_memory else lines[-1])
        seconds = [float(line) for line in done.stdout.split()][self._task.config.warmup_steps :]
        if not seconds:
            return self._measurement(configuration, failure="the command printed too few steps")
        return self._measurement(
            configuration,
            step_seconds=statistics.median(seconds),
            spread_seconds=half_spread(seconds),
            count=len(seconds),
        )

    def _measurement(self, configuration: Configuration, **seen: object) -> Measurement:
        return Measurement.model_validate(
            {
                "fingerprint": self._task.fingerprint,
                "model": self._task.model,
                "configuration": configuration,
                "time": time.time(),
                **seen,
            }
        )
