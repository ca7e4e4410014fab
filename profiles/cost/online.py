"""What the steps of the running job say about predictions: a common drift and each configuration's own miss, with
forgetting."""

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.work import Floats

SETTLED = 5.0
"""Steps after which one that is far off counts for less."""


@dataclass
class _Seen:
    weight: float = 0.0
    mean: float = 0.0


class OnlineCorrection:
    """Logarithm of seen ÷ predicted = drift of the whole machine + miss of the configuration + noise of the step, all
    normal.

    Every observed step halves, in `half_life_steps`, what earlier steps weigh, whichever configuration they were of:
    what was not run for long falls back to the prediction times the drift. With enough steps of one configuration the
    correction is their mean.
    """

    def __init__(
        self,
        half_life_steps: float = 200.0,
        drift_sd: float = 0.15,
        miss_sd: float = 0.05,
        noise_sd: float = 0.05,
    ) -> None:
        """Standard deviations of logarithms. Raises ValueError unless all are positive."""
        if not min(half_life_steps, drift_sd, miss_sd, noise_sd) > 0:
            raise ValueError("half_life_steps and the standard deviations have to be positive")
        self._keep = 0.5 ** (1 / half_life_steps)
        self._drift, self._miss, self._noise = drift_sd**2, miss_sd**2, noise_sd**2
        self._seen: dict[Configuration, _Seen] = {}

    def observe(self, configuration: Configuration, predicted_seconds: float, step_seconds: float) -> None:
        """Feed an ordinary step. Raises ValueError unless both times are positive and finite."""
        if not (0 < predicted_seconds < math.inf and 0 < step_seconds < math.inf):
            raise ValueError(
                f"predicted_seconds({predicted_seconds}) and step_seconds({step_seconds}) have to be positive and "
                "finite"
            )
        for seen in self._seen.values():
            seen.weight *= self._keep
        seen = self._seen.setdefault(configuration, _Seen())
        off = math.log(step_seconds / predicted_seconds) - seen.mean
        # A pause (a checkpoint, a slow disk) is no news about the configuration; a change that stays still
        # gets through.
        weight = 1.0 if seen.weight < SETTLED else 1 / (1 + off * off / (9 * self._noise))
        seen.weight += weight
        seen.mean += weight * off / seen.weight

    @property
    def drift(self) -> float:
        """How much slower the machine is than predicted: a factor, 1 while nothing has been seen."""
        return math.exp(self._posterior()[0])

    def factors(self, configurations: Configurations) -> tuple[Floats, Floats]:
        """What to multiply predictions by, and the standard deviation of its logarithm."""
        drift, variance = self._posterior()
        factors = np.full(len(configurations), math.exp(drift))
        sds = np.full(len(configurations), math.sqrt(variance + self._miss))
        for key, seen in self._seen.items():
            noise = self._noise / max(seen.weight, 1e-9)
            trust = self._miss / (self._miss + noise)
            places = _places(key, configurations)
            factors[places] = math.exp(drift + trust * (seen.mean - drift))
            sds[places] = math.sqrt((1 - trust) ** 2 * variance + trust * noise)
        return factors, sds

    def _posterior(self) -> tuple[float, float]:
        """Mean and variance of the drift's logarithm."""
        precision, total = 1 / self._drift, 0.0
        for seen in self._seen.values():
            if seen.weight > 1e-6:
                own = 1 / (self._miss + self._noise / seen.weight)
                precision += own
                total += own * seen.mean
        return total / precision, 1 / precision


def _places(one: Configuration, among: Configurations) -> NDArray[np.bool_]:
    alone = Configurations.of([one])
    same = np.ones(len(among), dtype=bool)
    for field in fields(alone):
        same &= getattr(among, field.name) == getattr(alone, field.name)[0]
    return same
