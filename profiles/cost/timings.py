"""Measured step times, as the cost model takes them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from profiles.cluster import Cluster
from profiles.configurations import Configurations
from profiles.measurement import Measurement
from profiles.model_shape import ModelShape


@dataclass(frozen=True)
class Timings:
    """Step times of configurations of one model on one cluster in one precision."""

    model: ModelShape
    """What ran."""
    cluster: Cluster
    """On what."""
    precision: str
    """fp32, bf16, fp16, fp8, …"""
    configurations: Configurations
    """How: N of them."""
    step_seconds: NDArray[np.float64]
    """Duration of an optimizer step of each."""
    shard: bool = False
    """Whether one accelerator ran one rank's work alone: then it is the duration of that, without network and bubble
    (`Measurement.shard`)."""

    @classmethod
    def of(cls, rows: Iterable[Measurement], cluster: Cluster) -> "list[Timings]":
        """Rows of a throughput table that have a time, by model and precision, shards apart from steps; all were
        measured on `cluster`, or for it."""
        groups: dict[tuple[ModelShape, str, bool], list[Measurement]] = {}
        for row in rows:
            if row.step_seconds is not None:
                groups.setdefault((row.model, row.fingerprint.precision, row.shard), []).append(row)
        return [
            cls(
                model=model,
                cluster=cluster,
                precision=precision,
                configurations=Configurations.of(row.configuration for row in group),
                step_seconds=np.array([row.step_seconds for row in group], dtype=float),
                shard=shard,
            )
            for (model, precision, shard), group in groups.items()
        ]

    def take(self, where: NDArray[np.bool_] | NDArray[np.int64]) -> "Timings":
        """The timings at the given places (a mask or indices)."""
        return replace(self, configurations=self.configurations.take(where), step_seconds=self.step_seconds[where])
