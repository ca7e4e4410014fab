"""How much memory a configuration takes on its fullest rank, before anything is launched."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from profiles.configurations import Configurations
from profiles.formatting import percent
from profiles.memory.components import COMPONENTS, stage_components
from profiles.memory.correction import Correction, grouped, learn
from profiles.memory.implementation import MEGATRON, Implementation
from profiles.memory.neighbours import coordinates
from profiles.memory.parameters import STAGES, Floats
from profiles.memory.peaks import OUTSIDE_BYTES, Peaks
from profiles.model_shape import ModelShape

PIPELINE_STAGES = {
    "even": "pipeline stages of as many layers, with fewer on the first and last if they do not divide",
    "balanced": "pipeline stages balanced by their work",
}
"""`Implementation.stages` in words."""
CHUNK = 8192
"""Configurations that are worked on at once: their arrays stay in the processor's cache."""
SURE = 0.05
"""A configuration whose chance to fit is smaller surely does not."""


@dataclass(frozen=True)
class PredictedMemory:
    """Peaks of N configurations."""

    peak_bytes: Floats
    """Expected peak of the fullest rank: the median."""
    low: Floats
    """Lower end of the interval; nan where none was asked for."""
    high: Floats
    """Upper end."""
    breakdown: dict[str, Floats]
    """Bytes of each part on that rank; they add up to `peak_bytes`."""
    stage: NDArray[np.int64]
    """Stage of that rank, an index into `STAGES`."""
    assumptions: tuple[str, ...]
    """What was taken for granted."""
    log_sd: Floats
    """Standard deviation of the peak's logarithm; nan where no interval was asked for."""
    freedom: float
    """Degrees of freedom of its Student distribution."""

    def chance_to_fit(self, memory_bytes: float) -> Floats:
        """Probability that the peak leaves `OUTSIDE_BYTES` of an accelerator's memory free."""
        room = np.log(max(memory_bytes - OUTSIDE_BYTES, 1.0) / self.peak_bytes)
        return np.asarray(stdtr(self.freedom, room / self.log_sd), dtype=np.float64)


class MemoryModel:
    """Predicts peak memory from any number of observations, none included. Immutable: `fit` returns another one."""

    def __init__(self, implementation: Implementation = MEGATRON, correction: Correction | None = None) -> None:
        self.implementation = implementation
        """How the framework is taken to be written."""
        self.correction = correction or Correction()
        """What observations said."""

    def fit(self, peaks: Sequence[Peaks]) -> "MemoryModel":
        """A model that also knows these peaks and failures, which replace those of an earlier fit. They come from one
        framework: the rows may say that it is written differently from what was assumed."""
        return MemoryModel(*learn(peaks, self.implementation))

    def predict(
        self, model: ModelShape, configurations: Configurations, precision: str, *, coverage: float | None = 0.8
    ) -> PredictedMemory:
        """Peaks with an interval that holds that share of them; `coverage=None` leaves it out, and is fast."""
        size = len(configurations)
        pieces = [
            self._piece(model, configurations.take(np.arange(at, min(at + CHUNK, size))), precision, coverage)
            for at in range(0, max(size, 1), CHUNK)
        ]
        return PredictedMemory(
            peak_bytes=np.concatenate([piece.peak_bytes for piece in pieces]),
            low=np.concatenate([piece.low for piece in pieces]),
            high=np.concatenate([piece.high for piece in pieces]),
            breakdown={
                name: np.concatenate([piece.breakdown[name] for piece in pieces]) for name in pieces[0].breakdown
            },
            stage=np.concatenate([piece.stage for piece in pieces]),
            assumptions=self.assumptions(model),
            log_sd=np.concatenate([piece.log_sd for piece in pieces]),
            freedom=self.correction.freedom,
        )

    def fits(
        self,
        model: ModelShape,
        configurations: Configurations,
        precision: str,
        memory_bytes: float,
        margin: float = 0.0,
    ) -> NDArray[np.bool_]:
        """Whether the expected peak, `OUTSIDE_BYTES` and that share of an accelerator's memory fit into it."""
        prediction = self.predict(model, configurations, precision, coverage=None)
        return prediction.peak_bytes + OUTSIDE_BYTES <= (1 - margin) * memory_bytes

    def assumptions(self, model: ModelShape) -> tuple[str, ...]:
        """What every prediction takes for granted, in words."""
        how, correction = self.implementation, self.correction
        said = [
            f"{how.attention} attention, {'with' if how.dropout else 'no'} dropout; {how.optimizer.in_words}"
            + ", and is in the backward pass" * how.optimizer_in_backward,
            f"gradients in {'fp32' if how.fp32_gradients else 'the precision of the model'}"
            + (", and again in buckets" if how.gradient_buckets else ""),
            f"{PIPELINE_STAGES[how.stages]}; logits in fp32 for the loss, {how.loss}",
            f"gathered inputs of sequence parallelism are {how.gathered_inputs}",
            f"{percent(how.fragmentation)} of activations and buffers lost to fragmentation",
            f"corrected by {correction.count} observations" if correction.count else "no peak seen: formulas alone",
        ]
        if model.experts:
            said.append("tokens spread evenly over the experts")
        return tuple(said)

    def _piece(self, model: ModelShape, c: Configurations, precision: str, coverage: float | None) -> PredictedMemory:
        how, correction = self.implementation, self.correction
        factors = {name: correction.factor(name) for name in COMPONENTS}
        stages = [stage_components(model, c, precision, how, stage) for stage in STAGES]
        totals = np.stack([sum(factors[name] * part for name, part in stage.items()) for stage in stages])
        fullest, rows = totals.argmax(axis=0), np.arange(len(c))
        parts = {name: np.stack([stage[name] for stage in stages])[fullest, rows] for name in COMPONENTS}
        peak = totals[fullest, rows] + correction.beside_bytes
        breakdown = {name: factors[name] * part for name, part in parts.items()}
        breakdown["other"] = np.full(len(c), correction.beside_bytes)
        needed = coverage is not None or correction.rows is not None
        places = coordinates(model, c) if needed else np.zeros((len(c), 0))
        if correction.rows is not None:
            nearby = correction.nearby(places)
            peak = peak * nearby
            breakdown = {name: part * nearby for name, part in breakdown.items()}
        if coverage is None:
            nothing = np.full(len(c), np.nan)
            return PredictedMemory(peak, nothing, nothing, breakdown, fullest, (), nothing, correction.freedom)
        sd = correction.log_sd(grouped(parts), places)
        half = float(stdtrit(correction.freedom, 0.5 + coverage / 2)) * sd
        return PredictedMemory(
            peak, peak * np.exp(-half), peak * np.exp(half), breakdown, fullest, (), sd, correction.freedom
        )
