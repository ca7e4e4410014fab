"""How much memory a configuration takes and whether it fits; what surely does not is not even measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from profiles.accelerator import memory_bytes
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.formatting import gibibytes
from profiles.measurement import Measurement
from profiles.memory import MEGATRON, Implementation, MemoryModel, Peaks
from profiles.memory.model import SURE
from profiles.memory.parameters import STAGES, Stage
from profiles.model_shape import ModelShape

LIKELY = 0.8
"""A configuration whose chance to fit is smaller is not proposed, nor run before it was measured."""


@dataclass(frozen=True)
class PeakMemory:
    """The largest memory of any rank, with its 80 % interval."""

    expected_bytes: float
    """The median of what is expected."""
    low_bytes: float
    """Lower end of the interval; the same as `expected_bytes` if the peak was measured."""
    high_bytes: float
    """Upper end."""
    parts: dict[str, float]
    """What the memory model says, part by part, bytes."""
    stage: Stage
    """Pipeline stage of that rank."""
    chance_to_fit: float | None
    """Probability that the configuration fits; None if that is not checked."""


class MemoryCheck:
    """The memory model of one job, after it learned from rows, and the memory that there is."""

    def __init__(
        self,
        model: ModelShape,
        cluster: Cluster,
        precision: str,
        rows: Iterable[Measurement] = (),
        implementation: Implementation = MEGATRON,
        measured: Callable[[Configuration], Configuration] = lambda configuration: configuration,
    ) -> None:
        """`measured` says what a step that measures the noise executes: its peak counts, if it is the larger one."""
        self.memory_bytes = memory_bytes(cluster)
        """Memory of one accelerator; None if nothing is checked."""
        self._model, self._precision, self._measured = model, precision, measured
        self._memory = MemoryModel(implementation).fit(Peaks.of(rows, self.memory_bytes))
        self._peaks: dict[Configuration, PeakMemory] = {}

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What every peak takes for granted, in words."""
        return self._memory.assumptions(self._model)

    def peaks(self, configurations: Sequence[Configuration]) -> list[PeakMemory]:
        """The peak of every configuration, in their order. Remembered, so that asking again costs nothing."""
        new = [configuration for configuration in configurations if configuration not in self._peaks]
        if new:
            others = {place: other for place, c in enumerate(new) if (other := self._measured(c)) != c}
            executed = Configurations.of([*new, *others.values()])
            predicted = self._memory.predict(self._model, executed, self._precision)
            chances = None if self.memory_bytes is None else predicted.chance_to_fit(self.memory_bytes)
            fullest = np.arange(len(new))
            for number, place in enumerate(others, start=len(new)):
                if predicted.peak_bytes[number] > predicted.peak_bytes[place]:
                    fullest[place] = number
            for configuration, index in zip(new, fullest, strict=True):
                self._peaks[configuration] = PeakMemory(
                    expected_bytes=float(predicted.peak_bytes[index]),
                    low_bytes=float(predicted.low[index]),
                    high_bytes=float(predicted.high[index]),
                    parts={name: float(part[index]) for name, part in predicted.breakdown.items()},
                    stage=STAGES[predicted.stage[index]],
                    chance_to_fit=None if chances is None else float(chances[index]),
                )
        return [self._peaks[configuration] for configuration in configurations]

    def refusal(self, peak: PeakMemory, least: float = SURE) -> str:
        """`does not fit: 84.1 GiB of 80.0 GiB` if the chance to fit is below `least`, else empty."""
        if self.memory_bytes is None or peak.chance_to_fit is None or peak.chance_to_fit >= least:
            return ""
        return f"{in_words(peak.chance_to_fit)}: {gibibytes(peak.expected_bytes)} of {gibibytes(self.memory_bytes)}"

    def refusals(self, configurations: Sequence[Configuration], least: float = SURE) -> dict[Configuration, str]:
        """Configurations whose chance to fit is below `least`, and the reason."""
        reasons = {
            configuration: self.refusal(peak, least)
            for configuration, peak in zip(configurations, self.peaks(configurations), strict=True)
        }
        return {configuration: reason for configuration, reason in reasons.items() if reason}

    def possible(self, configurations: Sequence[Configuration], start: Configuration) -> list[Configuration]:
        """Those that may fit, in their order, and those that differ from `start` in the global batch alone: the
        user chose them."""
        refused = self.refusals(configurations)
        chosen = (start.layout, start.micro_batch)
        return [
            configuration
            for configuration in configurations
            if configuration not in refused or (configuration.layout, configuration.micro_batch) == chosen
        ]


def in_words(chance: float | None) -> str:
    """`fits`, `should fit`, `may not fit`, `does not fit`; `not checked` if nobody knows the memory."""
    if chance is None:
        return "not checked"
    if chance < SURE:
        return "does not fit"
    if chance < LIKELY:
        return "may not fit"
    return "fits" if chance >= 1 - SURE else "should fit"
