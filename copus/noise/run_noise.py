"""The noise scale of a run, from whatever its steps were measured with."""

import math
from typing import Any

from copus.backends.step_contract import Parts, StepResult
from copus.noise.calibration import NormLayerCalibration
from copus.noise.estimator import NoiseEstimator
from copus.noise.memory import Clock
from copus.noise.step_estimate import StepEstimate, estimate_step
from planner.sampling import HalfLife
from profiles.noise_scale import NoiseScale


class RunNoise:
    """Takes the steps of a run, and gives the best estimate that they allow.

    Full sources (micro-batches, replicas) estimate the same two numbers and share one average. The norm layers have
    their own, which counts only after it has been calibrated on steps that measured both. Of the two, `estimate` gives
    the one with the narrower interval, and the full one if only that is known.
    """

    def __init__(self, half_life: HalfLife) -> None:
        self._clock = Clock(half_life)
        self._full = NoiseEstimator()
        self._norm_layers = NoiseEstimator()
        self._calibration = NormLayerCalibration()
        self._skipped = 0

    @property
    def skipped(self) -> int:
        """Steps left out because a figure was not finite, over the whole run."""
        return self._skipped

    @property
    def calibration(self) -> float | None:
        """κ: noise scale of the whole gradient over that of the norm layers; None while unknown."""
        factors = self._calibration.estimate()
        return None if factors is None else factors.kappa

    def update(self, result: StepResult, samples_consumed: int, global_batch: int) -> bool:
        """Add a step of the run, measured or not, that ended at `samples_consumed` sequences. Returns whether it said
        anything about the noise."""
        self._clock.tick(global_batch)
        steps = [_estimate(parts) for parts in (result.parts, result.norm_layer_parts)]
        if all(step is None for step in steps):
            return False
        if result.skipped or any(step is not None and not _finite(step) for step in steps):
            self._skipped += 1
            return False
        full, norm_layers = steps
        if full is not None:
            self._full.update(full, self._clock, samples_consumed, global_batch)
        if norm_layers is not None:
            self._norm_layers.update(norm_layers, self._clock, samples_consumed, global_batch)
        if full is not None and norm_layers is not None:
            self._calibration.update(full, norm_layers, self._clock, global_batch)
        return True

    def estimate(self) -> NoiseScale:
        """The noise scale now, with its 90 % interval; `value` is None while there is too little to tell."""
        full = self._full.estimate()
        calibrated = self._calibration.apply(self._norm_layers.estimate())
        if calibrated.value is not None and _relative_width(calibrated) < _relative_width(full):
            return calibrated
        return full.model_copy(update={"samples": max(full.samples, calibrated.samples)})

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {
            "clock": self._clock.state(),
            "full": self._full.state(),
            "norm_layers": self._norm_layers.state(),
            "calibration": self._calibration.state(),
            "skipped": self._skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave. An empty dict leaves a fresh meter, and so does a checkpoint of a version that had
        no clock: the noise scale is measured anew."""
        if "clock" in state:
            self._clock.restore(state["clock"])
            self._full.restore(state["full"])
            self._norm_layers.restore(state["norm_layers"])
            self._calibration.restore(state["calibration"])
            self._skipped = state["skipped"]


def _estimate(parts: Parts | None) -> StepEstimate | None:
    return None if parts is None else estimate_step(parts.grad_sq, parts.squared_norms, parts.part_size)


def _finite(step: StepEstimate) -> bool:
    return math.isfinite(step.grad_sq) and math.isfinite(step.noise_trace)


def _relative_width(noise: NoiseScale) -> float:
    """log(high / low); infinite where the interval is open or unknown."""
    if noise.value is None or noise.low is None or noise.high is None or noise.low <= 0:
        return math.inf
    return math.log(noise.high / noise.low)
