"""What to measure when there is time for one more: the candidate whose time says most about which is the fastest."""

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel, Timings
from profiles.cost.select import SETTLED
from profiles.cost.verify import gains
from profiles.measurement import Measurement
from profiles.throughput import Throughput


def last_measurement(
    candidates: Sequence[Configuration],
    rows: Iterable[Measurement],
    cluster: Cluster,
    leave_out: Collection[Configuration] = (),
) -> Configuration | None:
    """Mostly the one that the cost model, fitted to the rows, takes for the fastest; None where no measurement is
    expected to change the choice, or nothing is known yet.

    What the table says of a candidate is taken for measured (`Throughput.predict`), and stays. `leave_out` is neither
    measured nor chosen. The rows are of one model in one precision. Raises ValueError for an accelerator that the cost
    model does not know.
    """
    rows = list(rows)
    fitted_to, throughput = Timings.of(rows, cluster), Throughput(rows)
    if not fitted_to:
        return None
    known = [throughput.predict(each) for each in candidates]
    measured = np.array([(each and each.step_seconds) or np.nan for each in known], dtype=float)
    failing = np.array([bool(each and each.failure) for each in known], dtype=bool)
    left_out = np.array([each in leave_out for each in candidates], dtype=bool)
    model, precision = fitted_to[0].model, fitted_to[0].precision
    cost, may = CostModel().fit(fitted_to), ~failing & ~left_out
    found = gains(cost, model, cluster, Configurations.of(candidates), precision, measured, may)
    found[~may] = 0.0
    return candidates[int(np.argmax(found))] if found.max(initial=0.0) > SETTLED else None
