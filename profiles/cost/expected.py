"""What the cost model expects of configurations that nobody has measured, as the throughput table says it."""

import math
from collections.abc import Sequence

from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.model import CostModel
from profiles.measurement import Measurement
from profiles.model_shape import ModelShape
from profiles.throughput import DECILE, Prediction


def expected(
    cost: CostModel,
    model: ModelShape,
    cluster: Cluster,
    precision: str,
    configurations: Sequence[Configuration],
    rows: Sequence[Measurement] = (),
) -> dict[Configuration, Prediction]:
    """A prediction of each configuration, where `cost` was fitted to the rows. One whose shard failed is expected to
    fail.

    Raises ValueError for an accelerator without a file and for a precision that it does not have.
    """
    times = cost.predict(model, cluster, Configurations.of(configurations), precision)
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
    return found
