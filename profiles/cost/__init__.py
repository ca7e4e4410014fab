"""The cost model: how long a step takes, from the shape of the model, the machine, and any number of measured rows."""

from profiles.cost.expected import expected
from profiles.cost.model import CostModel, Predicted
from profiles.cost.timings import Timings

__all__ = ["CostModel", "Predicted", "Timings", "expected"]
