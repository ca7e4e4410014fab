"""Where the noise scale is going."""

from pydantic import PositiveFloat

from profiles.record import Record


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
