"""Which candidates surely do not fit into an accelerator's memory: nobody tries them, not even to measure."""

from collections.abc import Iterable, Sequence

import numpy as np

from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.accelerator import accelerator
from profiles.measurement import Measurement
from profiles.memory import MemoryModel, Peaks
from profiles.memory.model import SURE
from profiles.model_shape import ModelShape

GIB = 2.0**30


def memory_bytes(cluster: Cluster) -> float | None:
    """Memory of one of its accelerators; None for CPU cores, which share what the machine has, and for an accelerator
    that nothing is known about."""
    if cluster.accelerator == "cpu":
        return None
    try:
        return accelerator(cluster.accelerator).memory_bytes
    except ValueError:
        return None


class MemoryCheck:
    """Refuses what surely does not fit: a chance below `SURE`, by the memory model after it learned from rows."""

    def __init__(self, model: ModelShape, cluster: Cluster, precision: str, rows: Iterable[Measurement] = ()) -> None:
        self.memory_bytes = memory_bytes(cluster)
        """Of one accelerator; None where nothing is checked."""
        self._model, self._precision = model, precision
        self._memory = MemoryModel().fit(Peaks.of(rows, self.memory_bytes)) if self.memory_bytes else None

    def refusals(self, configurations: Sequence[Configuration]) -> dict[Configuration, str]:
        """`does not fit: 84.1 of 80.0 GiB` for each that surely does not, with the expected peak."""
        if self._memory is None or self.memory_bytes is None or not configurations:
            return {}
        found = self._memory.predict(self._model, Configurations.of(configurations), self._precision)
        too_much = np.flatnonzero(found.chance_to_fit(self.memory_bytes) < SURE)
        room = self.memory_bytes / GIB
        return {
            configurations[index]: f"does not fit: {found.peak_bytes[index] / GIB:.1f} of {room:.1f} GiB"
            for index in too_much.tolist()
        }

    def possible(self, configurations: Sequence[Configuration], start: Configuration) -> list[Configuration]:
        """Those that may fit, in their order, and those that differ from `start` in the global batch alone: the
        user chose them."""
        refused = self.refusals(configurations)
        chosen = (start.layout, start.micro_batch)
        return [each for each in configurations if each not in refused or (each.layout, each.micro_batch) == chosen]
