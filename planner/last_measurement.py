"""What to measure when there is time for one more: the candidate whose time says most about which is the fastest."""

from collections.abc import Collection

import numpy as np

from planner.predictor import Predictor
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.select import SETTLED
from profiles.cost.verify import gains


def last_measurement(predictor: Predictor, leave_out: Collection[Configuration] = ()) -> Configuration | None:
    """Mostly the candidate that the cost model takes for the fastest; None if no measurement is expected to change the
    choice, or nothing was measured yet.

    What the table says of a candidate counts as measured (`Throughput.predict`), and stays. `leave_out` is neither
    measured nor chosen.
    """
    cost, candidates = predictor.cost, predictor.candidates
    if cost is None or not cost.rows:
        return None
    predictions = [predictor.throughput.predict(candidate) for candidate in candidates]
    measured = np.array(
        [(p and p.source != "predicted" and p.step_seconds) or np.nan for p in predictions], dtype=float
    )
    may = np.array(
        [not (p and p.failure) and c not in leave_out for p, c in zip(predictions, candidates, strict=True)], dtype=bool
    )
    gain = gains(
        cost, predictor.model, predictor.cluster, Configurations.of(candidates), predictor.precision, measured, may
    )
    gain[~may] = 0.0
    return candidates[int(np.argmax(gain))] if gain.max(initial=0.0) > SETTLED else None
