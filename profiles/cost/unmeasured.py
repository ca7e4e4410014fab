"""Predictions of configurations that nobody has measured, in the terms of the throughput table."""

from collections.abc import Sequence

from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.errors import Errors
from profiles.cost.model import CostModel
from profiles.cost.work import Floats
from profiles.measurement import Measurement
from profiles.model_shape import ModelShape
from profiles.throughput import DECILE, CostPredictions, Prediction

COVERAGE = 0.8
"""Share that the interval of a `Prediction` holds: from the 10th to the 90th percentile."""


def predict_unmeasured(
    cost: CostModel,
    model: ModelShape,
    cluster: Cluster,
    precision: str,
    configurations: Sequence[Configuration],
    rows: Sequence[Measurement] = (),
) -> CostPredictions:
    """A prediction of each configuration, where `cost` was fitted to the rows, and how alike their errors are. One
    whose shard failed is expected to fail.

    Raises ValueError for an accelerator without a file and for a precision that it does not have.
    """
    arrays = Configurations.of(configurations)
    times = cost.predict(model, cluster, arrays, precision, coverage=None).seconds
    errors = cost.errors(model, cluster, arrays, precision)
    failed = {row.configuration: row.failure for row in sorted(rows, key=lambda row: row.time) if row.shard}
    predictions = {}
    halves = errors.half_widths(COVERAGE)
    for configuration, seconds, half in zip(configurations, times.tolist(), halves.tolist(), strict=True):
        if failure := failed.get(configuration):
            predictions[configuration] = Prediction(source="predicted", failure=failure)
        else:
            predictions[configuration] = Prediction(step_seconds=seconds, error=half / DECILE, source="predicted")
    return CostPredictions(predictions, _Alike(configurations, errors))


class _Alike:
    """The covariance of the errors of two predictions. Worked out for those that it is asked for."""

    def __init__(self, configurations: Sequence[Configuration], errors: Errors) -> None:
        self._places = {configuration: place for place, configuration in enumerate(configurations)}
        self._errors = errors
        self._columns: dict[int, Floats] = {}
        # As much larger than believed as a prediction's `error` is.
        self._scale = (errors.widening(COVERAGE) / DECILE) ** 2

    def __call__(self, one: Configuration, other: Configuration) -> float:
        """0 where there is no prediction of one of them."""
        here, there = self._places.get(one), self._places.get(other)
        if here is None or there is None:
            return 0.0
        if there not in self._columns:
            column = self._errors.covariance(slice(there, there + 1))[:, 0]
            self._columns[there] = self._scale * column
        return float(self._columns[there][here])
