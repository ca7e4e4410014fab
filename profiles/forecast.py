"""Where the noise scale is going."""

from pydantic import PositiveFloat, PositiveInt

from profiles.record import Record


class Forecast(Record):
    """The noise scale as a power law of the tokens trained on, B_simple = A·tokens^α, read at one later point."""

    tokens: PositiveFloat
    """Point that the figures are for, tokens since the start of the job."""
    value: PositiveFloat
    """B_simple there, in sequences."""
    low: PositiveFloat
    """Lower end of its 90 % prediction interval."""
    high: PositiveFloat
    """Upper end."""
    exponent: float
    """α."""
    exponent_low: float
    """Lower end of its 90 % interval."""
    exponent_high: float
    """Upper end."""
    points: PositiveInt
    """Noise scales that the law was fitted to."""
