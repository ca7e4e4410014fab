"""The score of a configuration: how fast it makes the model better."""

import math
from typing import Literal

import numpy as np

from planner.efficiency import statistical_efficiency
from planner.menu import Floats

Objective = Literal["plain", "lr-aware"]


def goodput(
    samples_per_second: float, global_batch: float, critical_batch: float, objective: Objective = "plain"
) -> float:
    """Goodput = throughput × statistical efficiency, in useful sequences a second (Pollux, OSDI'21, §3).

    `plain` is T · SE(B). `lr-aware` is T · SE(B) · √B: COPUS (2604.26687) for Adam with a √B learning rate. Batches
    are in sequences. Only ratios between configurations of one job mean anything. Raises ValueError unless both
    batches are positive.
    """
    useful = samples_per_second * statistical_efficiency(global_batch, critical_batch)
    return useful * math.sqrt(global_batch) if objective == "lr-aware" else useful


def progress_per_sample(
    global_batch: Floats | float, critical_batch: Floats | float, objective: Objective = "plain"
) -> Floats:
    """What a sequence makes of progress, which is Goodput over throughput: for arrays that broadcast, all positive."""
    useful = 1 / (1 + global_batch / np.asarray(critical_batch))
    return np.asarray(useful * np.sqrt(global_batch) if objective == "lr-aware" else useful)
