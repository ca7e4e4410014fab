"""Which candidates surely do not fit into an accelerator's memory: nobody tries them, not even to measure."""

from collections.abc import Iterable, Sequence

import numpy as np

from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.accelerator import accelerator
from profiles.measurement import Measurement
from profiles.memory import MEGATRON, Implementation, MemoryModel, Peaks
from profiles.memory.model import SURE
from profiles.model_shape import ModelShape

GIB = 2.0**30
LIKELY = 0.8
"""A configuration whose chance to fit is smaller is not proposed, nor run before it was measured."""


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

    def __init__(
        self,
        model: ModelShape,
        cluster: Cluster,
        precision: str,
        rows: Iterable[Measurement] = (),
        how: Implementation = MEGATRON,
    ) -> None:
        self.memory_bytes = memory_bytes(cluster)
        """Of one accelerator; None where nothing is checked."""
        self._model, self._precision = model, precision
        self._memory = MemoryModel(how).fit(Peaks.of(rows, self.memory_bytes)) if self.memory_bytes else None

    def refusals(self, configurations: Sequence[Configuration], least: float = SURE) -> dict[Configuration, str]:
        """`does not fit: 84.1 of 80.0 GiB`, with the expected peak, for each whose chance to fit is below `least`; `may
        not fit` where it is not sure."""
        if self._memory is None or self.memory_bytes is None or not configurations:
            return {}
        found = self._memory.predict(self._model, Configurations.of(configurations), self._precision)
        chances = found.chance_to_fit(self.memory_bytes)
        room = self.memory_bytes / GIB
        return {
            configurations[
                index
            ]: f"{in_words(float(chances[index]))}: {found.peak_bytes[index] / GIB:.1f} of {room:.1f} GiB"
            for index in np.flatnonzero(chances < least).tolist()
        }

    def possible(self, configurations: Sequence[Configuration], start: Configuration) -> list[Configuration]:
        """Those that may fit, in their order, and those that differ from `start` in the global batch alone: the
        user chose them."""
        refused = self.refusals(configurations)
        chosen = (start.layout, start.micro_batch)
        return [each for each in configurations if each not in refused or (each.layout, each.micro_batch) == chosen]


def in_words(chance: float | None) -> str:
    """`fits`, `should fit`, `may not fit`, `does not fit`; `not checked` where nobody knows the memory."""
    if chance is None:
        return "not checked"
    if chance < SURE:
        return "does not fit"
    if chance < LIKELY:
        return "may not fit"
    return "fits" if chance >= 1 - SURE else "should fit"
