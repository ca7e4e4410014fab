"""What moves have cost this job, by rung of the ladder, and how many there may be."""

import time
from collections import deque
from statistics import median
from typing import Any

import numpy as np

from planner.menu import RUNGS, Floats, Rung
from profiles.accelerator import is_described, on_network
from profiles.cluster import Cluster
from profiles.layout import Layout
from profiles.model_shape import ModelShape

MEMORY = 8
"""Moves of each rung that are looked back on."""
HOUR = 3600.0
BYTES_PER_WEIGHT, BYTES_PER_FP32_WEIGHT = 14, 12
"""What moves with a weight, at most: both of Adam's moments, an fp32 master, and the weight unless that is its own
master."""
LINK_SHARE, LINK_SHARE_CPU = 0.5, 0.9
"""Share of a link's bandwidth that a move reaches: with gloo as measured between two hosts (docs/hosts.md), with NCCL a
guess."""
BUILD_SECONDS, BUILD_SECONDS_CPU = 5.0, 0.5
"""Tearing down the old layout and building the new one, process groups included. On CPU cores as measured
(docs/moving.md); NCCL's communicators take seconds."""


def expected_layout_seconds(model: ModelShape, cluster: Cluster, layout: Layout, precision: str) -> float:
    """What a move to another layout is expected to take before one has been measured, in seconds.

    The time to build the new layout, and that to receive the weights and the optimizer state of a rank of `layout`
    through the slowest link. An accelerator without a file counts as one on 10 Gb/s Ethernet.
    """
    described, on_cpu = is_described(cluster.accelerator), cluster.accelerator == "cpu"
    links = on_network(cluster if described else cluster.model_copy(update={"accelerator": "cpu"}))
    link = links.inside_node if described and cluster.nodes == 1 else links.between_nodes
    bytes_per_weight = BYTES_PER_FP32_WEIGHT if precision == "fp32" else BYTES_PER_WEIGHT
    state_bytes = bytes_per_weight * model.parameters / (layout.tp * layout.pp)
    build_seconds, share = (BUILD_SECONDS_CPU, LINK_SHARE_CPU) if on_cpu else (BUILD_SECONDS, LINK_SHARE)
    return build_seconds + state_bytes / (share * link.bytes_per_second)


class MoveCosts:
    """Seconds of each rung: the median of the last 8 measured, or what the job file expects before the first.

    Also counts the layouts of the last hour, for the limit of the job file.
    """

    def __init__(self, expected_layout_seconds: float, max_layouts_per_hour: int | None) -> None:
        self._expected: dict[Rung, float] = {"batch": 0.0, "micro-batch": 0.0, "layout": expected_layout_seconds}
        self._measured: dict[Rung, deque[float]] = {rung: deque(maxlen=MEMORY) for rung in RUNGS}
        self._limit = max_layouts_per_hour
        self._layouts: list[float] = []

    def observe(self, rung: Rung, seconds: float) -> None:
        """A move was made, and training stood still for so long."""
        self._measured[rung].append(seconds)
        if rung == "layout":
            self._layouts.append(time.monotonic())

    def seconds(self) -> Floats:
        """Cost of a new batch, micro-batch, layout; ascending, shape (3,): a dearer rung includes the cheaper ones."""
        seconds = [median(self._measured[rung]) if self._measured[rung] else self._expected[rung] for rung in RUNGS]
        return np.maximum.accumulate(np.array(seconds))

    def refusal(self, rung: Rung) -> str:
        """Why there may be no such move now; empty if there may."""
        if rung != "layout" or self._limit is None:
            return ""
        now = time.monotonic()
        self._layouts = [at for at in self._layouts if now - at < HOUR]
        if len(self._layouts) < self._limit:
            return ""
        return f"limit: {self._limit} layout move{'s' * (self._limit != 1)} an hour"

    def state(self) -> dict[str, Any]:
        """What was measured, as plain values for a checkpoint; hours begin anew."""
        return {rung: list(seconds) for rung, seconds in self._measured.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        for rung in RUNGS:
            self._measured[rung].extend(state.get(rung, ()))
