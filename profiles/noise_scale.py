"""How noisy the gradients are: now, over the last steps alone, and as expected."""

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

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


class StepNorms(Record):
    """Squared gradient norms of the steps between two decisions: plain means over those that were measured, without
    smoothing.

    A step of J parts of n sequences, with part gradients g_j, mean gradient ḡ and S = Σ_j|g_j|² − J·|ḡ|², gives |ḡ|²
    and n·S/(J − 1), the worker variance of the norm test (2412.21124) scaled to one sequence.
    """

    grad_sq: float
    """Mean of |ḡ|², which noise makes larger than |G|² by tr Σ / batch."""
    noise_trace: float
    """Mean of n·S/(J − 1), an unbiased estimate of tr Σ."""
    steps: PositiveInt
    """Steps that the means are over."""


class Forecast(Record):
    """The noise scale to be expected at one later point of the job."""

    tokens: PositiveFloat
    """The point, tokens since the start of the job."""
    value: PositiveFloat
    """B_simple there, in sequences."""
    low: PositiveFloat
    """Lower end of its 90 % interval."""
    high: PositiveFloat
    """Upper end."""
