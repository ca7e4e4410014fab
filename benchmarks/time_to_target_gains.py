"""The statistics of `benchmarks.time_to_target`: how much sooner one way of training had the same loss as another."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

Run = dict[str, Any]
CELL = ("workload", "decay", "neighbour")
"""Runs that are compared with one another have these in common."""


def crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The place at which a curve of (place, loss) first comes down to the target, on the line between two evaluations;
    None if it stays above."""
    for (place, loss), (next_place, next_loss) in pairwise(curve):
        if next_loss <= target:
            share = (loss - target) / (loss - next_loss) if loss > next_loss else 1.0
            return place + share * (next_place - place)
    return None


def gains(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For every cell and policy: how much sooner it was there than the best fixed configuration, in percent.

    The best fixed configuration has the smallest mean over the seeds that all fixed ones have: hindsight. One that was
    given up after fewer seeds than others is none of them. A run is paired with that of the best fixed one with the
    same seed; low and high are the ends of Student's 90 % interval of the mean of the logarithms of the ratios. A
    policy that missed a target has no figure.
    """
    cells: defaultdict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        cells[tuple(run[name] for name in CELL)].append(run)
    rows = []
    for cell, members in cells.items():
        missed = {run["policy"] for run in members if run["seconds"] is None}
        kept = [run for run in members if run["policy"] not in missed]
        rows += [{**dict(zip(CELL, cell, strict=True)), **row} for row in _gains_of_cell(kept)]
    return rows


def _gains_of_cell(runs: Sequence[Run]) -> list[dict[str, Any]]:
    logs: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for run, seconds in zip(runs, at_equal_loss(runs), strict=True):
        logs[run["policy"]][run["seed"]] = math.log(seconds)
    fixed = {name: of_seed for name, of_seed in logs.items() if name.startswith("static-")}
    most = max(map(len, fixed.values()), default=0)
    rivals = [name for name, of_seed in fixed.items() if len(of_seed) == most]
    seeds = set.intersection(*(set(fixed[name]) for name in rivals)) if rivals else set()
    if not seeds:
        return []
    best = min(rivals, key=lambda name: float(np.mean([fixed[name][seed] for seed in seeds])))
    rows = []
    for name, of_seed in logs.items():
        ratios = [fixed[best][seed] - of_seed[seed] for seed in of_seed if seed in fixed[best]]
        if not ratios:
            continue
        middle, half = float(np.mean(ratios)), None
        if len(ratios) > 1:
            half = float(stats.t.ppf(0.95, len(ratios) - 1) * np.std(ratios, ddof=1) / math.sqrt(len(ratios)))
        rows.append(
            {
                "policy": name,
                "best_fixed": best,
                "seeds": len(ratios),
                "gain_over_best_fixed_pct": 100 * math.expm1(middle),
                "low": None if half is None else 100 * math.expm1(middle - half),
                "high": None if half is None else 100 * math.expm1(middle + half),
            }
        )
    return rows


def at_equal_loss(runs: Sequence[Run]) -> list[float]:
    """Seconds of the runs of one cell, brought to one final loss.

    With a decay only the end of a run has a loss that counts, and no two runs end at the same one. So seeds differ in
    the length of the run, which says what time buys: log seconds = (policy) + slope × final loss, with one slope for
    all, is fitted to the runs, and every run is moved along the slope to the median of the final losses. The shift is
    small (runs of one seed train on equally many tokens), so an error of the slope matters little. Runs that stopped at
    a target are left as they are; so are all if no policy ran at two lengths.
    """
    seconds = [float(run["seconds"]) for run in runs]
    if not runs or any(run["target_loss"] is not None for run in runs):
        return seconds
    slope = loss_slope(runs)
    if slope is None:
        return seconds
    middle = float(np.median([run["final_loss"] for run in runs]))
    return [one * math.exp(slope * (middle - run["final_loss"])) for one, run in zip(seconds, runs, strict=True)]


def loss_slope(runs: Sequence[Run]) -> float | None:
    """d log seconds / d final loss within policies, by least squares; None if no policy ran at two lengths."""
    policies: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        policies[run["policy"]].append(run)
    covered = cross = 0.0
    for members in policies.values():
        if len({run["tokens"] for run in members}) > 1:
            loss = np.array([run["final_loss"] for run in members])
            log = np.log([run["seconds"] for run in members])
            covered += float(((loss - loss.mean()) ** 2).sum())
            cross += float(((loss - loss.mean()) * (log - log.mean())).sum())
    return cross / covered if covered > 0 else None
