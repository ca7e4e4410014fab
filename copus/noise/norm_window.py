"""Squared gradient norms since the last decision, for the norm test."""

from profiles.noise_scale import StepNorms


class NormWindow:
    """Sums over the measured steps between two decisions; plain means, for a test that looks at what is now."""

    def __init__(self) -> None:
        self._sums = [0.0, 0.0, 0.0]  # steps, |ḡ|², tr Σ

    def add(self, grad_sq: float, noise_trace: float) -> None:
        """Add a step's |ḡ|² and its unbiased estimate of tr Σ."""
        for index, value in enumerate((1.0, grad_sq, noise_trace)):
            self._sums[index] += value

    def take(self) -> StepNorms | None:
        """The means, and begin anew; None if no step was measured."""
        steps, grad_sq, noise_trace = self._sums
        self._sums = [0.0, 0.0, 0.0]
        return StepNorms(grad_sq=grad_sq / steps, noise_trace=noise_trace / steps, steps=int(steps)) if steps else None

    def state(self) -> list[float]:
        """Everything, as plain values for a checkpoint."""
        return list(self._sums)

    def restore(self, state: list[float]) -> None:
        """Take up what `state` gave; an empty list changes nothing."""
        self._sums = list(state) or self._sums
