"""What a profiler is: something that says how long a step of a configuration takes.

docs/extending-the-profiler.md walks through writing one.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from profiles.cluster import Cluster
from profiles.config import ProfileConfig
from profiles.configuration import Configuration
from profiles.measurement import Fingerprint, Measurement
from profiles.model_shape import ModelShape

Processes = Literal["one", "all"]


@dataclass(frozen=True)
class Task:
    """What a profiler is made for."""

    model: ModelShape
    """The transformer."""
    cluster: Cluster
    """The machine that the configurations are for; it need not be the one that this runs on."""
    fingerprint: Fingerprint
    """What the job looks for in the table: measurements with another fingerprint are kept, and not used by it."""
    config: ProfileConfig
    """The job's `profile` section: steps to time, and the profiler's own `options`."""
    backend: Any = None
    """The running job (`copus.backends.base.Backend`), where `processes` is "all"; else None."""
    job: Any = None
    """The whole job file (`copus.job.JobConfig`), for a profiler that builds the job's model itself."""
    batches: Any = None
    """Its data, (first sample, how many) → tokens and labels, without end; None if there is no backend."""


class Profiler(Protocol):
    """Measures one configuration at a time. What measures which, how often and until when is none of its business."""

    def measure(self, configuration: Configuration) -> Measurement | None:
        """Time it, or return a `Measurement` with the `failure` that came instead; None if nothing can be said.

        With `processes` "all" every rank calls it, in the same order with the same configurations, and what rank 0
        returns is kept.
        """


class ProfilerType(Protocol):
    """What an entry point of the group `copus.profilers` names: most often the profiler's class."""

    processes: Processes
    """`all`: it runs in the job, on all of its ranks. `one`: in a single process, without the job's accelerators."""
    shards: bool
    """Whether it measures single shards without the network (`Measurement.shard`), not steps."""

    def __call__(self, task: Task) -> Profiler:
        """Make one. Raises ValueError, in one line, for options that it cannot take."""
