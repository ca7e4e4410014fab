"""The cost model: how long a step takes, from the shape of the model, the machine, and any number of measured rows."""

from profiles.cost.model import CostModel, Predicted
from profiles.cost.timings import Timings
from profiles.cost.unmeasured import predict_unmeasured

__all__ = ["CostModel", "Predicted", "Timings", "predict_unmeasured"]
