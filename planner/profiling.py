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
    sequences, so that a measurement stays short (the next larger one if none does). What the table can predict
    already is left out; an empty `Throughput()` means that everything is measured again.

    In the order of visits to layouts, `start`'s first: each visit doubles what is measured of a layout, from one
    configuration on. So every layout is seen once before any is seen twice, which tells the cost model most of what
    is not measured yet; and changing the layout, which takes time, is paid for by more and more measurements: log2 of
    their number times a layout. Every other round of visits goes backwards: the layout that it begins with is built.

    Within a layout small micro-batches come first, they are the short ones, and of `start`'s layout its own before
    all: without a time for the current configuration nothing can be decided.
    """
    groups: dict[Layout, dict[int, set[int]]] = {start.layout: {}}
    for candidate in candidates:
        needed = groups.setdefault(candidate.layout, {}).setdefault(candidate.micro_batch, set())
        if throughput.predict(candidate) is None:
            needed.add(candidate.num_microbatches)
    ordered: list[tuple[tuple[int, int, int], Configuration]] = []
    for place, (layout, by_micro_batch) in enumerate(groups.items()):
        own = start.micro_batch if layout == start.layout else None
        for line, micro_batch in enumerate(sorted(by_micro_batch, key=lambda size: (size != own, size))):
            counts = throughput.counts(layout, micro_batch)
            longest_count = longest_batch // (layout.dp * micro_batch)
            chosen = _counts(sorted(by_micro_batch[micro_batch]), counts, longest_count)
            # The places of what is known stay taken: a profile that was interrupted goes on where it was.
            for position, count in enumerate(chosen, start=2 * line + bool(counts)):
                visit = position.bit_length()  # 0, 1, 2 and 3, 4 to 7, …
                key = (visit, -place if visit % 2 else place, position)
                batch = count * layout.dp * micro_batch
                ordered.append((key, Configuration(layout=layout, micro_batch=micro_batch, global_batch=batch)))
    return [configuration for _, configuration in sorted(ordered, key=lambda item: item[0])]


def _counts(needed: list[int], measured: list[int], longest_count: int) -> list[int]:
    """Numbers of micro-batches to measure so that all the `needed` ones (ascending) become predictable."""
    if not needed:
        return []
    smallest = needed[0]
    chosen = [] if measured and measured[0] <= smallest else [smallest]
    rest = [count for count in needed if count not in chosen]
    if rest and len(measured) + len(chosen) < 2:
        reach = REACH * min(measured + chosen)
        short = [count for count in rest if count <= min(reach, longest_count)]
        chosen.append(max(short, default=rest[0]))
    return chosen
