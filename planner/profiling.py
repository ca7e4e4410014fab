"""What has to be measured before every candidate can be predicted."""

from collections.abc import Iterable

from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.throughput import Throughput

REACH = 4
"""The second count is at most this many times the first: enough to tell the fixed part of a step from what repeats."""


def to_measure(
    candidates: Iterable[Configuration], throughput: Throughput, start: Configuration, longest_batch: int = 64
) -> list[Configuration]:
    """The fewest configurations whose measurement lets `throughput` predict every candidate, the most useful first.

    Two numbers of micro-batches for each layout and micro-batch (a step is affine in them, `profiles.affine`): the
    smallest needed, and the largest needed one up to 4 times it that keeps the global batch within `longest_batch`
    sequences, so that a measurement stays short (the next larger one where none does). What the table can predict
    already is left out; an empty `Throughput()` means that everything is measured again.

    Ordered in two passes over the layouts, so that the layout changes seldom and an early stop costs little: first
    the small and middle micro-batches of every layout, then the large ones. The layout of `start` comes first, with
    its micro-batch in the first pass: without a time for the current configuration nothing can be decided.
    """
    groups: dict[Layout, dict[int, list[int]]] = {start.layout: {}}
    for candidate in candidates:
        needed = groups.setdefault(candidate.layout, {}).setdefault(candidate.micro_batch, [])
        if throughput.predict(candidate) is None:
            needed.append(candidate.num_microbatches)
    first: list[list[Configuration]] = []
    second: list[list[Configuration]] = []
    for layout, by_micro_batch in groups.items():
        small = set(sorted(by_micro_batch)[: len(by_micro_batch) // 2 + 1])
        if layout == start.layout:
            small.add(start.micro_batch)
        early: list[Configuration] = []
        late: list[Configuration] = []
        for micro_batch, needed in sorted(by_micro_batch.items()):
            known = throughput.counts(layout, micro_batch)
            longest_count = longest_batch // (layout.dp * micro_batch)
            part = early if micro_batch in small else late
            for count in _counts(sorted(set(needed)), known, longest_count):
                batch = count * layout.dp * micro_batch
                part.append(Configuration(layout=layout, micro_batch=micro_batch, global_batch=batch))
        first.append(early)
        second.append(late)
    # Backwards the second time: the last layout of the first pass is built already.
    return [configuration for part in (*first, *reversed(second)) for configuration in part]


def _counts(needed: list[int], known: list[int], longest_count: int) -> list[int]:
    """Numbers of micro-batches to measure so that all the `needed` ones (ascending) become predictable."""
    if not needed:
        return []
    smallest = needed[0]
    chosen = [] if known and known[0] <= smallest else [smallest]
    rest = [count for count in needed if count not in chosen]
    if rest and len(known) + len(chosen) < 2:
        reach = REACH * min(known + chosen)
        short = [count for count in rest if count <= min(reach, longest_count)]
        chosen.append(max(short, default=rest[0]))
    return chosen
