"""Which measurements could still change which configuration is the fastest at each global batch."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from planner.profiling import to_measure
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Measurement
from profiles.throughput import Throughput, relative_spread

UNSEEN_DRIFT = 0.10
"""Share of its time by which a configuration measured once may be off because the machine was slow or fast then. With
more rounds the difference between them tells."""

_Group = tuple[Layout, int]


def next_round(
    candidates: Sequence[Configuration],
    rows: Iterable[Measurement],
    start: Configuration,
    rounds: int,
    within: float,
    leave_out: Collection[Configuration] = (),
) -> list[Configuration]:
    """What to measure next, the most informative first; nothing when the ranking is settled.

    First what makes every candidate predictable at all (`to_measure`, whose order it keeps). Then, again, what
    `contested` names, until each has been measured `rounds` times. What is in `leave_out` is not measured.
    """
    rows = list(rows)
    lacking = [candidate for candidate in to_measure(candidates, Throughput(rows), start) if candidate not in leave_out]
    if lacking:
        return lacking
    times = _times_measured(rows)
    again = [
        candidate
        for candidate in contested(candidates, rows, within)
        if times[candidate] < rounds and candidate not in leave_out
    ]
    # A round that was interrupted is finished first: a line is known as often as the less known of its points.
    fewest: dict[_Group, int] = {}
    for candidate in again:
        fewest[_group(candidate)] = min(times[candidate], fewest.get(_group(candidate), rounds))
    return [candidate for candidate in again if times[candidate] == fewest[_group(candidate)]]


def contested(candidates: Iterable[Configuration], rows: Sequence[Measurement], within: float) -> list[Configuration]:
    """The measured configurations that another measurement of could change a ranking, by how much it could, in order of
    layouts.

    At a global batch the fastest candidate l, its step time t_l known to ± u_l (a share of it), is contested by c where

        t_l · (1 + u_l) / (t_c · (1 − u_c)) − 1 > within

    which is what choosing l could cost at worst. The one of the two that was measured in fewer rounds is then in
    question, or both, and so are the rows that its time comes from. u is the ± of the prediction, and `UNSEEN_DRIFT`
    on top after a single round.
    """
    throughput, times = Throughput(rows), _times_measured(rows)
    points: defaultdict[_Group, list[Configuration]] = defaultdict(list)
    for configuration in times:
        points[_group(configuration)].append(configuration)
    repeats = {group: min(times[point] for point in members) for group, members in points.items()}
    by_batch: defaultdict[int, list[tuple[float, float, _Group]]] = defaultdict(list)
    for candidate in candidates:
        prediction = throughput.predict(candidate)
        if prediction is None or prediction.step_seconds is None:
            continue
        group = _group(candidate)
        rounds = repeats[group]
        share = math.hypot(relative_spread(prediction.error), UNSEEN_DRIFT if rounds == 1 else 0.0)
        by_batch[candidate.global_batch].append((prediction.step_seconds, min(share, 0.9), group))
    stakes: defaultdict[_Group, float] = defaultdict(float)
    for known_times in by_batch.values():
        seconds, unsure, leader = min(known_times, key=lambda timed: timed[0])
        for other_seconds, other_unsure, other in known_times:
            stake = seconds * (1 + unsure) / (other_seconds * (1 - other_unsure)) - 1
            if other != leader and stake > within:
                for group in (other, leader):
                    if repeats[group] == min(repeats[other], repeats[leader]):
                        stakes[group] = max(stakes[group], stake)
    most = {layout: max(stakes[group] for group in stakes if group[0] == layout) for layout, _ in stakes}
    ordered = sorted(stakes, key=lambda group: (-most[group[0]], group[0].label, -stakes[group], group[1]))
    return [point for group in ordered for point in sorted(points[group], key=lambda point: point.num_microbatches)]


def _group(configuration: Configuration) -> _Group:
    return configuration.layout, configuration.micro_batch


def _times_measured(rows: Iterable[Measurement]) -> defaultdict[Configuration, int]:
    """Rows with a time of each configuration."""
    times: defaultdict[Configuration, int] = defaultdict(int)
    for row in rows:
        if row.step_seconds is not None:
            times[row.configuration] += 1
    return times
