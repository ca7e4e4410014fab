"""The critical batch of a running job: what it is now, and what it is expected to become."""

import math
from typing import Any

import numpy as np

from planner.config import PlannerConfig
from planner.critical_batch_factor import CriticalBatchFactor
from planner.forecast import QUANTILE_90, CriticalBatchForecast, law_correction, log_error
from profiles.noise_scale import Forecast, NoiseScale


class CriticalBatchTracker:
    """φ = c · B_simple, in sequences, from every noise scale and every loss of a run.

    B_simple is measured (`copus.noise`), and its growth is forecast (`CriticalBatchForecast`). c is that of the job
    file until changes of batch teach more about it (`CriticalBatchFactor`), corrected by what published laws expect of
    φ (`law_correction`).
    """

    def __init__(
        self,
        config: PlannerConfig,
        total_samples: int,
        seq_len: int,
        factor_range: float,
        window_samples: int,
        laws: CriticalBatchForecast | None,
    ) -> None:
        """`total_samples` is the length of the job, and `window_samples` the longest stretch on either side of a change
        of batch that c is learned from, both in sequences. `factor_range` is how far the ends of the 90 % interval of c
        lie from it, as a factor; 1 takes c for exact. `laws` is φ as published laws expect it of the job; None if they
        are not about it."""
        self._laws = laws
        self._law_shift = 0.0
        self._prior = config.critical_batch_factor
        self._min_steps = config.min_noise_samples
        self._seq_len = seq_len
        # Of φ with the c of the job file, so that what is learned of c corrects earlier estimates too.
        self._forecast = CriticalBatchForecast.unknown(np.array([float(total_samples)]))
        self._observed_at = 0
        """Sequences trained on when the last noise scale came in."""
        self._factor = CriticalBatchFactor(self._prior, factor_range, window_samples)
        self._error = self._factor.error
        """Standard error of log c, after the correction."""

    @property
    def factor(self) -> float:
        """c, as the job file says and laws and the run have taught."""
        return self._factor.value * math.exp(self._law_shift)

    @property
    def factor_interval(self) -> tuple[float, float]:
        """The 90 % interval of c."""
        factor = math.exp(QUANTILE_90 * self._error)
        return self.factor / factor, self.factor * factor

    @property
    def forecast(self) -> CriticalBatchForecast:
        """φ from all noise scales so far, and where it is going, for one run; with the present c and its error."""
        return self._forecast.scaled(self.factor / self._prior, self._error)

    def observe_loss(self, samples_consumed: int, global_batch: int, loss: float) -> None:
        """Feed every step's mean training loss, in nats per token: what changes of batch do to it tells what c is."""
        self._factor.observe(samples_consumed, global_batch, loss)

    def observe_noise(self, noise: NoiseScale, samples_consumed: int) -> float | None:
        """Feed the noise scale of every decision. Returns φ now; None while the noise scale is unknown, or has seen
        fewer than `planner.min_noise_samples` steps.

        The noise scale is an average, which belongs to its centroid. The forecast takes it up there, and says by how
        much it has grown since then.
        """
        self._factor.noise_scale = None
        value = noise.value
        if value is None or not 0 < value < math.inf or noise.samples < self._min_steps:
            return None
        here = float(max(samples_consumed, 1))
        centroid = min(noise.centroid or here, here)
        # For an average that forgets exponentially, `here - centroid` is the number of sequences in which its memory
        # fades to 1/e: so much of it was in the estimate of the last decision too.
        passed = samples_consumed - self._observed_at
        repeated = math.exp(-max(passed, 1) / (here - centroid)) if self._observed_at and centroid < here else 0.0
        error = log_error(noise.low, noise.high)
        self._forecast.observe(
            np.array([centroid]), np.array([self._prior * value]), np.array([error]), (1 - repeated) / (1 + repeated)
        )
        self._observed_at = samples_consumed
        grown = float(self._forecast.grown(np.array([centroid]), np.array([here]))[0])
        self._factor.noise_scale = grown * value, error
        self._error = self._factor.error
        if self._laws is not None:
            measured, errors = np.array([self._factor.value * grown * value]), np.array([[error], [self._error]])
            shift, left = law_correction(self._laws.at(np.array([here])), measured, *errors)
            self._law_shift, self._error = float(shift[0]), float(left[0])
        return self.factor * grown * value

    def noise_scale_at(self, samples: int) -> Forecast | None:
        """The noise scale expected after so many sequences, with its 90 % interval; None before the first one."""
        if not self._forecast.samples[0]:
            return None
        low, value, high = (
            float(self._forecast.at(np.array([float(samples)]), sigmas)[0]) / self._prior
            for sigmas in (-QUANTILE_90, 0.0, QUANTILE_90)
        )
        return Forecast(tokens=samples * self._seq_len, value=value, low=low, high=high)

    def state(self) -> dict[str, Any]:
        """What was learned, as plain values for a checkpoint."""
        return {
            "forecast": self._forecast.state() | {"observed_at": self._observed_at},
            "factor": self._factor.state(),
            "laws": [self._law_shift, self._error],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        self._factor.restore(state.get("factor", {}))
        self._law_shift, self._error = state.get("laws", (0.0, self._factor.error))
        if forecast := state.get("forecast"):
            self._forecast.restore(forecast)
            self._observed_at = forecast["observed_at"]
