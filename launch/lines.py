"""Throughput over the global batch, a line for each layout: the picture that explains this project, as numbers."""

from collections.abc import Iterable
from typing import NamedTuple

from profiles.configuration import Configuration
from profiles.formatting import count
from profiles.measurement import Measurement
from profiles.query import Summary


class LinePoint(NamedTuple):
    """The fastest micro-batch of a layout at a global batch."""

    layout: str
    batch: int
    micro_batch: int
    rate: float
    """Sequences a second."""
    spread: float
    """Half-width of its interval."""
    source: str
    """measured, interpolated, extrapolated, predicted, seen."""


Lines = dict[str, list[LinePoint]]
"""Layout → its line, by ascending batch."""


def point(configuration: Configuration, step_seconds: float, spread_seconds: float | None, source: str) -> LinePoint:
    """A step time as throughput."""
    layout, batch = configuration.layout.label, configuration.global_batch
    rate = batch / step_seconds
    spread = rate * (spread_seconds or 0.0) / step_seconds
    return LinePoint(layout, batch, configuration.micro_batch, rate, spread, source)


def fastest(points: Iterable[LinePoint]) -> Lines:
    """The fastest micro-batch of each layout at each batch; layouts in the order in which they come."""
    best: dict[str, dict[int, LinePoint]] = {}
    for point in points:
        line = best.setdefault(point.layout, {})
        if point.batch not in line or line[point.batch].rate < point.rate:
            line[point.batch] = point
    return {layout: [line[batch] for batch in sorted(line)] for layout, line in best.items()}


def winners(lines: Lines) -> list[LinePoint]:
    """The fastest layout at each global batch, ascending."""
    top: dict[int, LinePoint] = {}
    for line in lines.values():
        for point in line:
            if point.batch not in top or top[point.batch].rate < point.rate:
                top[point.batch] = point
    return [top[batch] for batch in sorted(top)]


def lines_of(members: Iterable[Summary]) -> Lines:
    """The lines of comparable summaries."""
    return fastest(
        point(row.configuration, row.step_seconds, row.spread_seconds, "measured")
        for row in (summary.measurement for summary in members)
        if row.step_seconds is not None
    )


def heading(measurement: Measurement) -> str:
    """What a group of rows is about, in one line."""
    model, print_ = measurement.model, measurement.fingerprint
    what = "shards alone, without network" if measurement.shard else "steps"
    return (
        f"{count(model.parameters)} parameters ({model.layers} layers of {model.hidden}, {model.seq_len} tokens), "
        f"{print_.precision}, {print_.hardware}: {what}"
    )
