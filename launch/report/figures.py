"""The smaller plots of a report, as plotly's plain figures: `{"data": […], "layout": {…}}`."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from copus.audit import Outcome
from launch.history import History, LossAt, StepAt
from launch.lines import LinePoint
from launch.report.series import GoodputAt, SeenPoint, memory_of_spans, thinned, thinned_peaks
from launch.report.style import (
    BAD,
    GOOD,
    GRID,
    INK,
    MUTED,
    NOISE,
    TOKENS,
    Axis,
    Figure,
    plot_layout,
    powers_of_two,
    quiet_axis,
    short,
    text,
)
from profiles.formatting import count, duration, signed_percent

MOST_LINES = 10
"""Layouts that the crossing lines have room for."""
SMALL = 190
"""Height of a plot of which three stand side by side."""


def curve(rows: Sequence[LossAt], axis: Axis, name: str, colour: str, width: float, *, markers: bool = False) -> Figure:
    """A line through losses."""
    line: Figure = {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": name,
        "x": [short(axis.place(row.tokens, row.seconds), 7) for row in rows],
        "y": [short(row.loss) for row in rows],
        "line": {"color": colour, "width": width},
    }
    return line | {"marker": {"color": colour, "size": 6}} if markers else line


def speed(history: History, rows: Sequence[GoodputAt], axis: Axis, shades: Mapping[str, str]) -> Figure:
    """Tokens/s, in the colour of the layout that ran, and the model FLOP utilization on an axis at the right."""
    kept = thinned(list(zip(rows, history.steps, strict=True)))
    rates = [row.throughput * history.seq_len for row, _ in kept]
    data = []
    for name, colour in shades.items():
        mine = [history.spans[step.span].configuration.layout.label == name for _, step in kept]
        if any(mine):
            heights = [rate if here else None for rate, here in zip(rates, mine, strict=True)]
            data.append(_small_curve([row for row, _ in kept], heights, axis, text(name), colour))
    figure = _small(axis, "tokens/s", data)
    top = 1.08 * min(max(rates), 3 * median(rates))
    figure["layout"]["yaxis"] |= {"range": [0, short(top)], "tickformat": "~s", "hoverformat": ".3~s"}
    peak = history.first_start.peak_samples_per_second if history.first_start else None
    if peak:
        share = {"overlaying": "y", "side": "right", "range": [0, short(100 * top / peak / history.seq_len)]}
        figure["layout"]["yaxis2"] = quiet_axis("MFU (%)") | share | {"showgrid": False, "nticks": 4}
        ghost = _small_curve([row for row, _ in kept[:1]], [0.0], axis, "MFU", MUTED)
        figure["data"].append(ghost | {"yaxis": "y2", "hoverinfo": "skip", "opacity": 0})
        figure["layout"]["margin"]["r"] = 52
    return figure


def efficiency(rows: Sequence[GoodputAt], axis: Axis) -> Figure:
    """Statistical efficiency in percent."""
    kept = thinned(rows)
    heights = [None if row.efficiency is None else 100 * row.efficiency for row in kept]
    figure = _small(axis, "efficiency (%)", [_small_curve(kept, heights, axis, "efficiency", NOISE)])
    figure["layout"]["yaxis"]["range"] = [0, 105]
    return figure


def of_steps(
    history: History, axis: Axis, title: str, value: Callable[[StepAt], float | None], *, logarithmic: bool = False
) -> Figure:
    """Something that every step has."""
    kept = thinned_peaks(history.steps, lambda step: value(step) or 0.0)
    figure = _small(axis, title, [_small_curve(kept, [value(step) for step in kept], axis, title, INK)])
    if logarithmic:
        heights = [value(step) or 0.0 for step in kept]
        low, high = min(filter(None, heights), default=1.0), max(heights, default=1.0)
        # Ticks at 1, 2 and 5 of each decade, as long as these are few.
        del figure["layout"]["yaxis"]["nticks"]
        figure["layout"]["yaxis"] |= {"type": "log", "dtick": "D2" if high < 30 * low else 1}
        figure["data"][0]["line"]["width"] = 1
    else:
        figure["layout"]["yaxis"] |= {"tickformat": "~g"}
    return figure


def memory(history: History, axis: Axis) -> Figure | None:
    """Peak memory of a rank as it was predicted of what ran; diamonds are what moves took. None without either."""
    predicted = memory_of_spans(history)
    moves = [move for move in history.moves if move.event.peak_bytes]
    if not predicted and not moves:
        return None
    data: list[Figure] = []
    if predicted:
        places = [axis.place(*at) for first, last, _ in predicted for at in (first, last)]
        heights = [peak / 2**30 for _, _, peak in predicted for _ in range(2)]
        line: Figure = {"type": "scatter", "mode": "lines", "name": "predicted", "line": {"color": INK, "width": 2}}
        data.append(line)
        line |= {"x": [short(place, 7) for place in places], "y": [short(height) for height in heights]}
    if moves:
        marker = {"symbol": "diamond", "size": 8, "color": GOOD}
        seen: Figure = {"type": "scatter", "mode": "markers", "name": "seen in a move", "marker": marker}
        seen["x"] = [short(axis.place(move.tokens, move.seconds), 7) for move in moves]
        seen["y"] = [short((move.event.peak_bytes or 0) / 2**30) for move in moves]
        data.append(seen)
    figure = _small(axis, "memory per rank (GiB)", data)
    figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return figure


def _small(axis: Axis, title: str, data: list[Figure]) -> Figure:
    layout = plot_layout(axis, "", height=SMALL)
    del layout["legend"]
    heading = {"xref": "paper", "yref": "paper", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
    heading |= {"text": title, "showarrow": False, "font": {"size": 12.5, "color": MUTED}}
    layout |= {"showlegend": False, "annotations": [heading]}
    layout["margin"] |= {"t": 24, "b": 26, "l": 48, "r": 10}
    layout["xaxis"] |= {"title": {"text": ""}, "nticks": 6}
    layout["yaxis"] |= {"nticks": 5, "fixedrange": True}
    layout["font"]["size"] = 12
    return {"data": data, "layout": layout}


def _small_curve(
    rows: Sequence[StepAt] | Sequence[GoodputAt], heights: Sequence[float | None], axis: Axis, name: str, colour: str
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [short(axis.place(row.tokens, row.seconds), 7) for row in rows],
        "y": [None if height is None else short(height) for height in heights],
        "line": {"color": colour, "width": 1.8},
    }


def predictions(outcomes: Sequence[Outcome], shades: Mapping[str, str]) -> Figure:
    """Step times as predicted, with their 80 % intervals, against those that were seen; on the diagonal both agree."""
    data: list[Figure] = []
    times = [second for o in outcomes for second in (o.score.step_seconds or 0.0, o.seen_seconds)]
    ends = [min(times) / 1.5, max(times) * 1.5]
    diagonal = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip", "showlegend": False}
    data.append(diagonal | {"line": {"color": MUTED, "width": 1, "dash": "dot"}})
    for name, colour, held in (("within its interval", GOOD, True), ("outside", BAD, False)):
        kept = [outcome for outcome in outcomes if outcome.held is held]
        if not kept:
            continue
        points = [(o.score.step_seconds or 0.0, o.seen_seconds, o.score) for o in kept]
        spread = [score.step_seconds_spread or 0.0 for _, _, score in points]
        # The interval is symmetric in the logarithm: predicted ÷ (1 + s) to predicted · (1 + s).
        below = [x - x / (1 + s / x) for (x, _, _), s in zip(points, spread, strict=True)]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{name} ({len(kept)})",
                "x": [short(x) for x, _, _ in points],
                "y": [short(y) for _, y, _ in points],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [short(s) for s in spread],
                    "arrayminus": [short(s) for s in below],
                    "color": MUTED,
                    "thickness": 1,
                    "width": 3,
                },
                "marker": {
                    "size": 10,
                    "color": [shades.get(score.configuration.layout.label, MUTED) for _, _, score in points],
                    "line": {"color": colour, "width": 2.5},
                },
                "hovertext": [
                    f"{text(score.configuration.label)}: predicted {duration(x)}, seen {duration(y)} "
                    f"({signed_percent(y / x - 1)})"
                    for x, y, score in points
                ],
                "hoverinfo": "text",
            }
        )
    layout = plot_layout(Axis("predicted step (s)", TOKENS.place), "seen step (s)", height=380)
    for name in ("xaxis", "yaxis"):
        layout[name] |= {"type": "log", "showgrid": True, "gridcolor": GRID, "dtick": "D2", "tickformat": "~g"}
    layout["hovermode"] = "closest"
    return {"data": data, "layout": layout}


def lines(
    predicted: Mapping[str, Sequence[LinePoint]], seen: Sequence[SeenPoint], shades: Mapping[str, str], seq_len: int
) -> Figure:
    """Tokens/s over the global batch, a line for each layout; what the run saw as diamonds."""
    best = sorted(predicted, key=lambda name: -max(point.rate for point in predicted[name]))[:MOST_LINES]
    ran = {point.layout for point in seen}
    shown = [name for name in predicted if name in best or name in ran]
    data = [_line(name, predicted[name], shades[name], seq_len) for name in shown]
    if seen:
        data.append(_diamonds(seen, shades, seq_len))
    batches = sorted({point.batch for points in predicted.values() for point in points} | {p.batch for p in seen})
    rates = [seq_len * point.rate for points in predicted.values() for point in points]
    rates += [seq_len * point.rate for point in seen]
    layout = plot_layout(Axis("global batch (sequences)", TOKENS.place), "tokens/s", height=380)
    layout["xaxis"] |= {"type": "log", "tickvals": batches, "ticktext": [str(batch) for batch in batches]}
    if max(rates) > 6 * min(rates):
        layout["yaxis"] |= powers_of_two(min(rates) / 1.3, max(rates) * 1.3)
    else:
        layout["yaxis"] |= {"rangemode": "tozero", "tickformat": "~s"}
    layout["hovermode"] = "closest"
    return {"data": data, "layout": layout}


def _line(name: str, points: Sequence[LinePoint], colour: str, seq_len: int) -> Figure:
    """What a layout is predicted to make; full circles where it was measured."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": text(name),
        "x": [point.batch for point in points],
        "y": [short(seq_len * point.rate) for point in points],
        "line": {"color": colour, "width": 2},
        "marker": {
            "size": 8,
            "color": colour,
            "symbol": ["circle" if _is_measured(point) else "circle-open" for point in points],
        },
        "hovertext": [
            f"{text(name)} B{point.batch} m{point.micro_batch}: "
            f"{count(seq_len * point.rate)} ± {count(seq_len * point.spread)} ({point.source})"
            for point in points
        ],
        "hoverinfo": "text",
    }


def _diamonds(seen: Sequence[SeenPoint], shades: Mapping[str, str], seq_len: int) -> Figure:
    """What the run saw of its configurations."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "seen in this run",
        "x": [point.batch for point in seen],
        "y": [short(seq_len * point.rate) for point in seen],
        "marker": {
            "symbol": "diamond",
            "size": 12,
            "color": [shades.get(point.layout, MUTED) for point in seen],
            "line": {"color": INK, "width": 1.5},
        },
        "hovertext": [
            f"{text(point.layout)} B{point.batch} m{point.micro_batch}: {count(seq_len * point.rate)}, "
            f"median of {point.steps} steps"
            for point in seen
        ],
        "hoverinfo": "text",
    }


def _is_measured(point: LinePoint) -> bool:
    return point.source in ("measured", "seen")
