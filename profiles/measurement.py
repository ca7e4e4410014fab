"""What was seen when a configuration ran."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from profiles.configuration import Configuration
from profiles.model_shape import ModelShape
from profiles.record import Record

OUT_OF_MEMORY = "out of memory"
"""The `failure` of a measurement for lack of memory."""


class Fingerprint(Record):
    """What has to be equal for two measurements to be about the same thing."""

    model: str
    """Digest of the model's shape (`ModelShape.digest`)."""
    precision: str
    """fp32 or bf16."""
    backend: str
    """Training framework and version: megatron-core 0.16.1."""
    hardware: str
    """Accelerator, how many of them and on how many nodes (`profiles.hardware`)."""
    software: str
    """Versions that matter for speed (torch, CUDA or gloo), and settings of the job that do."""


class Measurement(Record):
    """One row of a throughput table: a time, or the failure that came instead."""

    fingerprint: Fingerprint
    """On what, with what."""
    model: ModelShape
    """The model that ran, so that a table explains itself."""
    configuration: Configuration
    """What ran."""
    step_seconds: PositiveFloat | None = None
    """Median duration of an optimizer step."""
    spread_seconds: NonNegativeFloat | None = None
    """Half the width between the 10th and the 90th percentile of the steps."""
    count: NonNegativeInt = 0
    """Steps that were timed."""
    peak_bytes: NonNegativeInt | None = None
    """Largest memory in use on any rank: allocated on the accelerator, or resident on a CPU."""
    failure: str | None = None
    """Why there is no time: `out of memory`, …"""
    shard: bool = False
    """True if one accelerator ran one rank's shard alone: the time is that of its computation, without network,
    waiting and pipeline bubble. Never the time of a step."""
    time: float = Field(ge=0)
    """When it was measured, seconds since the epoch."""

    @model_validator(mode="after")
    def _check_time_or_failure(self) -> "Measurement":
        if (self.step_seconds is None) == (self.failure is None):
            raise ValueError("a measurement has either step_seconds or failure, and not both")
        return self

    @property
    def samples_per_second(self) -> float:
        """Throughput in sequences a second; 0 for a failure."""
        return 0.0 if self.step_seconds is None else self.configuration.global_batch / self.step_seconds
