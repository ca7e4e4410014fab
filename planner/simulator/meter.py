"""A noise scale as a job measures it: an average over the steps so far, which is late, and sure after many steps."""

from dataclasses import dataclass

import numpy as np

from planner.menu import Floats
from planner.sampling import SHARE_OF_JOB, STEPS

STEP_NOISE = 0.8
"""Standard deviation of the logarithm of an estimate from one step: as in jobs whose interval was ± 30 % after 20."""
YOUNG = 0.3
"""In the beginning the half-life of the averages is this share of the steps so far (`copus.noise`)."""


@dataclass
class NoiseMeter:
    """The averages of R runs; samples and batches in sequences, shape (R,)."""

    average: Floats
    """φ as it is read."""
    centroid: Floats
    """Sequences trained on at the centre of gravity of the average."""
    variance: Floats
    """Squared standard error of the logarithm of `average`."""

    @classmethod
    def unknown(cls, runs: int) -> "NoiseMeter":
        """Nothing measured yet."""
        return cls(np.zeros(runs), np.zeros(runs), np.zeros(runs))

    def observe(
        self, critical_batch: Floats, first: Floats, last: Floats, batch: Floats, job_samples: Floats, error: Floats
    ) -> None:
        """The steps from `first` to `last` sequences were measured, at a mean φ of `critical_batch`. `error` are
        standard normal draws."""
        length, middle = last - first, (first + last) / 2
        variance = STEP_NOISE**2 * batch / length
        half_life = np.maximum(SHARE_OF_JOB * job_samples, STEPS * batch)
        half_life = np.minimum(half_life, np.maximum(YOUNG * last, length / 2))
        old = np.where(self.average > 0, 0.5 ** (length / half_life), 0.0)
        reading = critical_batch * np.exp(np.sqrt(variance) * error)
        self.average = old * self.average + (1 - old) * reading
        self.centroid = old * self.centroid + (1 - old) * middle
        self.variance = old**2 * self.variance + (1 - old) ** 2 * variance

    def take(self, rows: np.ndarray) -> "NoiseMeter":
        """The averages of some of the runs."""
        return NoiseMeter(self.average[rows], self.centroid[rows], self.variance[rows])
