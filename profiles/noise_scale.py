"""How noisy the gradients are."""

from pydantic import NonNegativeFloat, NonNegativeInt

from profiles.record import Record


class NoiseScale(Record):
    """The simple gradient noise scale tr Σ / |G|² (McCandlish et al. 2018, eq. 2.9), with what it was made from.

    `value`, `low` and `high` are None while too little has been seen, or while nothing can be told from it: then
    nobody may decide anything from it.
    """

    grad_sq: float
    """Smoothed estimate of |G|², the squared norm of the true gradient."""
    noise_trace: float
    """Smoothed estimate of tr Σ, the summed variance of the gradient of one sequence."""
    value: float | None
    """tr Σ / |G|², in sequences."""
    low: float | None
    """Lower end of the 90 % interval of `value`."""
    high: float | None
    """Upper end of the 90 % interval of `value`; None also when it is unbounded."""
    samples: NonNegativeInt
    """Optimizer steps that the estimate has seen since the start of the job."""
    centroid: NonNegativeFloat | None = None
    """Sequences that the job had consumed at the centre of gravity of the averages: the place that the figures belong
    to, which lies behind the last step. None: no average, the figures are those of the last step."""
