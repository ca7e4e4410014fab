"""What the memory model learns from: peaks that were seen, and configurations that ran out of memory."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from profiles.configurations import Configurations
from profiles.measurement import OUT_OF_MEMORY, Measurement
from profiles.memory.parameters import Floats
from profiles.model_shape import ModelShape

OUTSIDE_BYTES = 2**30
"""Memory of an accelerator that no tensor can have: the driver's context and the communication library's."""


@dataclass(frozen=True)
class Peaks:
    """N configurations of one model, in one precision."""

    model: ModelShape
    """What ran."""
    configurations: Configurations
    """How."""
    precision: str
    """fp32, or anything of two bytes."""
    peak_bytes: Floats
    """Largest memory of any rank; nan where it failed."""
    at_least_bytes: Floats
    """Memory that did not suffice, for those that ran out of it; nan for the others."""

    @classmethod
    def of(cls, rows: Iterable[Measurement], memory_bytes: float | None = None) -> list["Peaks"]:
        """Rows of a throughput table, by model and precision. Failures count where `memory_bytes`, the memory of an
        accelerator, is known; other rows without a peak are left out."""
        groups: dict[tuple[ModelShape, str], list[Measurement]] = {}
        for row in rows:
            failed = row.failure == OUT_OF_MEMORY and memory_bytes is not None
            if failed or (row.failure is None and row.peak_bytes):
                groups.setdefault((row.model, row.fingerprint.precision), []).append(row)
        return [
            cls(
                model,
                Configurations.of(row.configuration for row in rows),
                precision,
                np.array([np.nan if row.failure else float(row.peak_bytes or 0) for row in rows]),
                np.array([float(memory_bytes or 0) if row.failure else np.nan for row in rows]),
            )
            for (model, precision), rows in groups.items()
        ]

    def take(self, where: np.ndarray) -> "Peaks":
        """The peaks at the given places (a mask or indices)."""
        return Peaks(
            self.model,
            self.configurations.take(where),
            self.precision,
            self.peak_bytes[where],
            self.at_least_bytes[where],
        )
