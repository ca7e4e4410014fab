"""How the critical batch grows over a run: φ on an even grid of progress."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from planner.menu import Floats

POINTS = 513
"""Points of the grid, from no progress to the target."""


def grid() -> Floats:
    """Progress at the points, from 0 to 1: effective samples as a share of those that the target takes."""
    return np.linspace(0.0, 1.0, POINTS)


def at_progress(critical_batch: Floats, progress: Floats) -> Floats:
    """φ of each run at its own progress, in straight lines between the points: shapes (R, POINTS) and (R,)."""
    place = np.clip(progress, 0.0, 1.0) * (critical_batch.shape[1] - 1)
    low = np.minimum(place.astype(np.int64), critical_batch.shape[1] - 2)
    rows = np.arange(len(critical_batch))
    return np.asarray(
        critical_batch[rows, low] + (place - low) * (critical_batch[rows, low + 1] - critical_batch[rows, low])
    )


def geometric(first: float, last: float) -> Floats:
    """φ from `first` to `last`, equal ratios in equal progress."""
    return np.asarray(first * (last / first) ** grid())


def linear(first: float, last: float) -> Floats:
    """φ from `first` to `last`, equal amounts in equal progress."""
    return first + (last - first) * grid()


def power(first: float, last: float, exponent: float = 0.5) -> Floats:
    """φ ∝ progress^exponent, never below `first`, `last` at the end: laws of critical batches over training have
    exponents of 0.47 to 0.57 (Zhang 2410.21676, Power Lines 2505.13738, Step Law, Merrill 2505.23971)."""
    return np.maximum(first, last * grid() ** exponent)


def kaplan_critical_batch(loss: float, seq_len: int) -> float:
    """φ in sequences at a loss in nats per token: 2.1·10⁸ · L^−4.8 tokens (Kaplan et al., 2001.08361, fig. 10)."""
    return 2.1e8 * loss**-4.8 / seq_len


def steps(ends: Sequence[float], batches: Sequence[float]) -> Floats:
    """φ that is constant up to each share of the run: what a published batch schedule says it is."""
    places = np.searchsorted(np.asarray(ends, float), grid(), side="left")
    return np.asarray(batches, float)[np.minimum(places, len(batches) - 1)]


def through(progress: Sequence[float], critical_batch: Sequence[float]) -> Floats:
    """φ through given points, straight lines between them in the logarithm; for what a run recorded."""
    order = np.argsort(progress)
    x, y = np.asarray(progress, float)[order], np.asarray(critical_batch, float)[order]
    return np.exp(np.interp(grid(), x, np.log(y)))


def published_schedules(file: Path) -> dict[str, Floats]:
    """φ trajectories from the batch schedules of `batch_noise.csv`: each batch from its tokens on, in sequences, the
    whole run twice as long as to the last change. Models with one batch only are left out."""
    points_of_model: dict[str, list[tuple[float, float]]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["kind"] != "schedule":
                continue
            try:
                point = float(row["tokens_seen_or_budget"]), float(row["batch_sequences"])
            except ValueError:
                try:
                    point = (
                        float(row["tokens_seen_or_budget"]),
                        float(row["batch_tokens"]) / float(row["seq_len"]),
                    )
                except ValueError:
                    continue
            points_of_model.setdefault(row["model"], []).append(point)
    schedules = {}
    for model, points in points_of_model.items():
        points.sort()
        if len(points) > 1 and points[0][0] == 0:
            total = 2 * points[-1][0]
            ends = [tokens / total for tokens, _ in points[1:]] + [1.0]
            schedules[model] = steps(ends, [batch for _, batch in points])
    return schedules
