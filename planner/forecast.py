"""Where the critical batch is and where it is going: a power law that forgets, kept up with a few sums."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.menu import Floats
from profiles.model_shape import ModelShape

EXPONENT = 0.5
"""Before anything is seen, φ ∝ samples^α with this α: what is measured over training lengths and in branched runs
(Zhang 2410.21676: 0.47; Power Lines 2505.13738: 0.5; Step Law: 0.57; Merrill 2505.23971: 0.5)."""
EXPONENT_ERROR = 1.0
"""Standard error of that: neither a pause nor growth faster than the samples is surprising."""
HALF_LIFE = 0.35
"""Estimates count half when this many e-foldings of samples have passed since: no law holds over the whole run."""
OFFSET = 0.05
"""Share of the job over which a law has not yet set in: φ ∝ (samples + offset)^α. Together with α = 0.5 this says that
φ grows by the factor of 4.6 over a job, as published batch schedules do (3 to 10: Llama 3, MiniMax-01, DeepSeek-V3,
Nemotron-4, OLMo, BLOOM)."""
LAWS_ERROR = 1.0
"""Standard error of the logarithm of φ as published laws give it, for a model and a text of one's own: a factor of 5
either way, 90 %."""
LAWS_FREEDOM = 5.0
"""Degrees of freedom of that error. It is a guess: a law is sometimes simply not about one's job."""
FEWEST = 12
"""An estimate fades by no more than 1 in so many from one to the next."""
BEND = 2.0
"""Standard deviation of the change of α over an e-folding of samples to come. Over the memory, laws that speed up and
laws that slow down look alike: with this the interval at twice the samples holds for both."""
QUANTILE_90 = 1.645
"""Standard errors from the middle to the ends of a 90 % interval."""


@dataclass
class CriticalBatchForecast:
    """log φ = level + α·(samples / samples now − 1), by least squares in which old estimates fade, for R runs at once.

    Discounted regression (Brown 1963; Harvey 1989, §2.2.3): weighted sums are all that is kept. α is the local
    exponent of φ ∝ samples^α. Behind, the line is straight in samples, which fits laws that speed up as well as powers
    over the short memory; ahead, the local power goes on, which does not run away, and its error grows as α may bend.
    The prior on α stands in for what few points cannot tell. Where estimates miss their prediction by more than their
    own intervals say, all errors grow by the excess (Birge).
    """

    offset: Floats
    """Sequences that are added to all sample counts, shape (R,)."""
    samples: Floats
    """Sequences at the last estimate, the offset added; 0 before it; shape (R,)."""
    sums: Floats
    """Σw, Σwx, Σwx², Σwy, Σwxy with x = samples / samples now − 1, shape (R, 5)."""
    misses: Floats
    """Σ of faded squared misses over their expected size, and Σ of their weights, shape (R, 2)."""
    common_error: Floats | float = 0.0
    """Standard error of log φ that all estimates share, such as that of c; shape (R,)."""

    @classmethod
    def unknown(cls, job_samples: Floats) -> "CriticalBatchForecast":
        """Nothing seen yet of jobs of so many sequences, shape (R,)."""
        runs = len(job_samples)
        return cls(OFFSET * job_samples, np.zeros(runs), np.zeros((runs, 5)), np.tile([1.0, 1.0], (runs, 1)))

    @classmethod
    def of_laws(cls, job_samples: float, model: ModelShape) -> "CriticalBatchForecast":
        """What is expected of one job before anything is measured, from its length and the size of its model.

        φ at the end of D tokens of a model of N weights is the geometric mean of three laws: 22.91·(D/10⁹)^0.47
        sequences of 512 tokens (Zhang et al., 2410.21676: critical batches of 85 M to 1.2 B parameters), 0.58·D^0.571
        tokens (Step Law, 2503.04715: best batches), and 0.292·(6·N·D)^0.3271 tokens (DeepSeek LLM, 2401.02954: the
        same). They differ by 20 at 10⁶ tokens and at 10¹², hence the error. φ grows to that as above.
        """
        tokens = job_samples * model.seq_len
        zhang, step_law = 22.91 * 512 * (tokens / 1e9) ** 0.47, 0.58 * tokens**0.571
        deepseek = 0.292 * (6 * model.parameters * tokens) ** 0.3271
        at_end = (zhang * step_law * deepseek) ** (1 / 3) / model.seq_len
        forecast = cls.unknown(np.array([float(job_samples)]))
        at_first = at_end * (OFFSET / (1 + OFFSET)) ** EXPONENT
        forecast.observe(np.array([1.0]), np.array([at_first]), np.array([LAWS_ERROR]))
        return forecast

    def observe(
        self, samples: Floats, critical_batch: Floats, error: Floats, independent: Floats | float = 1.0
    ) -> None:
        """Take in φ after so many sequences, with the standard error of its logarithm. `independent` is the share of
        the estimate that is new since the last: a moving average repeats itself."""
        samples, y = np.asarray(samples, float) + self.offset, np.log(critical_batch)
        first = self.samples <= 0
        ratio = np.where(first, 1.0, self.samples / samples)
        fade = np.maximum(ratio ** (math.log(2) / HALF_LIFE), 1 - 1 / FEWEST)
        n, x1, x2, y0, xy = self.sums.T
        shift = ratio - 1  # x becomes ratio·x + shift
        x2, x1 = ratio**2 * x2 + 2 * ratio * shift * x1 + shift**2 * n, ratio * x1 + shift * n
        xy = ratio * xy + shift * y0
        self.sums = np.stack([n, x1, x2, y0, xy], axis=1) * fade[:, None]
        self.samples = samples
        variance = np.asarray(error, float) ** 2
        level, spread = self._line()[0], self._covariance()[:, 0, 0]
        miss = np.where(first, 0.0, (y - level) ** 2 / np.where(first, 1.0, variance + spread))
        seen = np.stack([miss, np.where(first, 0.0, 1.0)], axis=1) * np.reshape(independent, (-1, 1))
        self.misses = self.misses * fade[:, None] + seen
        weight = independent / variance
        self.sums += np.stack([weight, 0 * y, 0 * y, weight * y, 0 * y], axis=1)

    def at(self, samples: Floats, sigmas: float = 0.0, *, with_common_error: bool = True) -> Floats:
        """φ expected at so many sequences, shape (R,) or (R, K), `sigmas` standard errors of its logarithm up or down,
        with or without the error that all estimates share. Before anything is seen it is NaN."""
        samples = np.asarray(samples, float)
        samples = samples + self.offset[(slice(None),) + (None,) * (samples.ndim - 1)]
        shape = (slice(None),) + (None,) * (samples.ndim - 1)
        x = np.log(samples / self.samples[shape])
        level, slope = (values[shape] for values in self._line())
        covariance = self._covariance() * self.excess[:, None, None]
        common = np.square(self.common_error) if with_common_error else 0.0
        level = level + sigmas * np.sqrt(covariance[:, 0, 0] + common)[shape]
        ahead = np.maximum(x, 0.0)
        slope = slope + sigmas * np.sqrt(covariance[:, 1, 1][shape] + (BEND * ahead / 2) ** 2)
        slope = np.where(x > 0, np.maximum(slope, 0.0), slope)
        return np.exp(np.clip(level + slope * x, -300.0, 300.0))

    def grown(self, since: Floats, now: Floats) -> Floats:
        """What φ is expected to have grown by from `since` to `now`, shape (R,). It is no more than the growth of the
        samples: few points may look steeper than any law of training."""
        return np.minimum(self.at(now) / self.at(since), now / since)

    @property
    def excess(self) -> Floats:
        """How much squared misses exceed what the intervals of the estimates say, at least 1; shape (R,)."""
        return np.maximum(self.misses[:, 0] / self.misses[:, 1], 1.0)

    def _determinant(self) -> tuple[Floats, Floats]:
        n, x1, x2 = self.sums[:, 0], self.sums[:, 1], self.sums[:, 2] + EXPONENT_ERROR**-2
        return np.where(n > 0, n * x2 - x1**2, np.nan), x2

    def _line(self) -> tuple[Floats, Floats]:
        """Level and slope, shapes (R,)."""
        determinant, x2 = self._determinant()
        n, x1, _, y0, xy = self.sums.T
        xy = xy + EXPONENT * EXPONENT_ERROR**-2
        return (x2 * y0 - x1 * xy) / determinant, (n * xy - x1 * y0) / determinant

    def _covariance(self) -> Floats:
        """Covariance of level and slope, shape (R, 2, 2), before the excess."""
        determinant, x2 = self._determinant()
        n, x1 = self.sums[:, 0], self.sums[:, 1]
        return np.stack([np.stack([x2, -x1], -1), np.stack([-x1, n], -1)], -2) / determinant[:, None, None]

    def scaled(self, factor: Floats | float, error: Floats | float) -> "CriticalBatchForecast":
        """The forecast of `factor` times as much, where log `factor` has a standard error; shapes (R,)."""
        shift = np.log(factor)
        n, x1 = self.sums[:, 0], self.sums[:, 1]
        sums = self.sums + np.stack([0 * n, 0 * n, 0 * n, n * shift, x1 * shift], axis=1)
        return replace(self, sums=sums, common_error=error)

    def take(self, rows: np.ndarray) -> "CriticalBatchForecast":
        """The forecasts of some of the runs."""
        return CriticalBatchForecast(self.offset[rows], self.samples[rows], self.sums[rows], self.misses[rows])

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {
            "offset": self.offset.tolist(),
            "samples": self.samples.tolist(),
            "sums": self.sums.tolist(),
            "misses": self.misses.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        if state:
            self.offset, self.samples = np.array(state["offset"]), np.array(state["samples"])
            self.sums, self.misses = np.array(state["sums"]), np.array(state["misses"])


def law_correction(laws: Floats, measured: Floats, error: Floats, factor_error: Floats) -> tuple[Floats, Floats]:
    """What published laws do to a φ that the noise scale says: by how much its logarithm changes, and the error of log
    φ that is left of c's. Shapes (R,).

    Laws are measured on whole runs of equal batches, and the noise scale on gradients: two estimates of φ that err
    independently, so their precisions are weights. `error` is that of the logarithm of the noise scale, and
    `factor_error` that of log c, which all estimates share. A c that is exact is not corrected. The error of laws has
    the tails of Student's t: the further they are off, the less they count.
    """
    away = np.log(laws / measured)
    variance = np.square(error) + np.square(factor_error)
    likely = (LAWS_FREEDOM + 1) / (LAWS_FREEDOM + np.square(away) / (variance + LAWS_ERROR**2))
    of_laws = LAWS_ERROR / np.sqrt(likely)
    share = np.where(np.asarray(factor_error) > 0, variance / (variance + of_laws**2), 0.0)
    return share * away, factor_error * of_laws / np.hypot(factor_error, of_laws)


def log_error(low: float | None, high: float | None) -> float:
    """Standard error of a logarithm from a 90 % interval; a factor of two if the interval is open or missing."""
    if low is None or high is None or low <= 0 or not math.isfinite(high):
        return math.log(2)
    return max(math.log(high / low) / (2 * QUANTILE_90), 0.01)
