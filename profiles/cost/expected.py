"""What the cost model expects of configurations that nobody has measured, as the throughput table says it."""

import math
from collections.abc import Sequence

import numpy as np

from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.errors import Errors
from profiles.cost.model import CostModel
from profiles.cost.work import Floats
from profiles.measurement import Measurement
from profiles.model_shape import ModelShape
from profiles.throughput import DECILE, Expected, Prediction


def expected(
    cost: CostModel,
    model: ModelShape,
    cluster: Cluster,
    precision: str,
    configurations: Sequence[Configuration],
    rows: Sequence[Measurement] = (),
) -> Expected:
    """A prediction of each configuration, where `cost` was fitted to the rows, and how alike their errors are. One
    whose shard failed is expected to fail.

    Raises ValueError for an accelerator without a file and for a precision that it does not have.
    """
    arrays = Configurations.of(configurations)
    times = cost.predict(model, cluster, arrays, precision)
    failed = {row.configuration: row.failure for row in sorted(rows, key=lambda row: row.time) if row.shard}
    found = {}
    for configuration, seconds, high in zip(configurations, times.seconds.tolist(), times.high.tolist(), strict=True):
        if failure := failed.get(configuration):
            found[configuration] = Prediction(source="predicted", failure=failure)
        else:
            error = math.log(high / seconds) / DECILE
            found[configuration] = Prediction(
                step_seconds=seconds, spread_seconds=high - seconds, error=error, source="predicted"
            )
    errors = cost.errors(model, cluster, arrays, precision)
    return Expected(found, _Alike(configurations, np.log(times.high / times.seconds) / DECILE, errors))


class _Alike:
    """The covariance of the errors of two predictions. Worked out for those that it is asked for."""

    def __init__(self, configurations: Sequence[Configuration], error: Floats, errors: Errors) -> None:
        """`error` is the standard error of each, a measurement's noise included, which no two share."""
        self._places = {configuration: place for place, configuration in enumerate(configurations)}
        self._errors = errors
        self._columns: dict[int, Floats] = {}
        # Intervals also say how sure the variances are: as much wider are covariances.
        self._scale = error / np.sqrt(errors.variance() + errors.how.noise_sd**2)

    def __call__(self, one: Configuration, other: Configuration) -> float:
        """0 where there is no prediction of one of them."""
        here, there = self._places.get(one), self._places.get(other)
        if here is None or there is None:
            return 0.0
        if there not in self._columns:
            column = self._errors.covariance(slice(there, there + 1))[:, 0]
            self._columns[there] = self._scale * column * self._scale[there]
        return float(self._columns[there][here])
