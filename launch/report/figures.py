"""The plots of a report, as plotly's plain figures: `{"data": […], "layout": {…}}`."""

from collections.abc import Mapping, Sequence

from launch.history import History, LossAt
from launch.lines import LinePoint
from launch.report.series import KIND_WORDS, GoodputAt, SeenPoint, smoothed_loss, thinned
from launch.report.style import (
    ACCENT,
    FAINT,
    GRID,
    INK,
    MUTED,
    NOISE,
    PAGE,
    TOKENS,
    Axis,
    Figure,
    plot_layout,
    powers_of_two,
    quiet_axis,
    short,
    text,
)
from planner.wording import duration, three_digits

MOST_MOVES = 120
"""Moves that are marked; of more only those to another layout are, as long as they are not too many either."""
MOST_LINES = 10
"""Layouts that the crossing lines have room for."""
LANES = {
    "down": "down",
    "checkpoints": "checkpoint",
    "evaluating": "evaluation",
    "moving": "move",
    "starting": "starting",
    "measuring": "measuring",
}
"""Kinds of pauses that have a lane in the timeline, from the bottom up; a decision takes milliseconds and has none."""


def loss(history: History, axis: Axis, shades: Mapping[str, str]) -> Figure:
    """Training loss, smoothed, and validation loss."""
    steps = [step for step in history.steps if step.loss is not None]
    raw, smooth = thinned([LossAt(step.tokens, step.seconds, step.loss or 0.0) for step in steps]), smoothed_loss(steps)
    data = [
        curve(raw, axis, "training", FAINT, 1),
        curve(thinned(smooth), axis, "smoothed", ACCENT, 2),
    ]
    if history.evaluations:
        data.append(curve(history.evaluations, axis, "validation", INK, 2, markers=True))
    layout = plot_layout(axis, "loss (nats a token)", height=360)
    _mark(layout, history, axis, shades)
    return {"data": data, "layout": layout}


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


def noise(history: History, axis: Axis, shades: Mapping[str, str]) -> Figure:
    """Noise scale with its interval, and the batch, on a log scale."""
    rows = thinned(history.noise)
    steps = thinned(history.steps)
    values = [step.batch for step in steps] + [row.value for row in rows]
    floor, top = min(values) / 1.6, max(values) * 1.6
    banded = [row for row in rows if row.low is not None]
    data: list[Figure] = []
    if banded:
        places = [short(axis.place(row.tokens, row.seconds), 7) for row in banded]
        high = [top * 10 if row.high is None else row.high for row in banded]
        low = [max(row.low or 0.0, floor / 10) for row in banded]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "90 % interval",
                "x": [*places, *reversed(places)],
                "y": [short(value) for value in (*high, *reversed(low))],
                "fill": "toself",
                "fillcolor": NOISE,
                "opacity": 0.25,
                "line": {"width": 0, "color": NOISE},
                "hoverinfo": "skip",
            }
        )
    for name, colour, width, shape, places, heights in (
        (
            "noise scale B_simple",
            NOISE,
            2,
            "linear",
            [axis.place(row.tokens, row.seconds) for row in rows],
            [row.value for row in rows],
        ),
        (
            "global batch",
            INK,
            2.5,
            "vh",
            [axis.place(step.tokens, step.seconds) for step in steps],
            [step.batch for step in steps],
        ),
    ):
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [short(place, 7) for place in places],
                "y": [short(height) for height in heights],
                "line": {"color": colour, "width": width, "shape": shape},
            }
        )
    layout = plot_layout(axis, "sequences", height=380)
    layout["yaxis"] |= powers_of_two(floor, top)
    _mark(layout, history, axis, shades)
    return {"data": data, "layout": layout}


def goodput(history: History, rows: Sequence[GoodputAt], axis: Axis, shades: Mapping[str, str]) -> Figure:
    """Throughput, statistical efficiency and their product, one below the other."""
    kept = thinned(list(zip(rows, history.steps, strict=True)))
    places = [short(axis.place(row.tokens, row.seconds), 7) for row, _ in kept]
    data: list[Figure] = []
    for layout_name, colour in shades.items():
        mine = [history.spans[step.span].configuration.layout.label == layout_name for _, step in kept]
        if any(mine):
            rates = [short(row.throughput) if here else None for (row, _), here in zip(kept, mine, strict=True)]
            data.append(_panel(places, rates, text(layout_name), colour, "y", legend=True))
    efficiency = [None if row.efficiency is None else short(100 * row.efficiency) for row, _ in kept]
    data.append(_panel(places, efficiency, "efficiency", NOISE, "y2"))
    if any(row.unmoved is not None for row, _ in kept) and history.moves:
        unmoved = [None if row.unmoved is None else short(row.unmoved) for row, _ in kept]
        data.append(_panel(places, unmoved, "had it stayed in its first configuration", MUTED, "y3", legend=True))
        data[-1]["line"]["dash"] = "dash"
    data.append(
        _panel(places, [None if r.goodput is None else short(r.goodput) for r, _ in kept], "goodput", INK, "y3")
    )
    layout = plot_layout(axis, "samples/s", height=560)
    layout["yaxis"] |= {"domain": [0.70, 1.0], "rangemode": "tozero"}
    layout["yaxis2"] = quiet_axis("efficiency (%)") | {"gridcolor": GRID, "domain": [0.36, 0.64], "range": [0, 105]}
    layout["yaxis3"] = quiet_axis("goodput") | {"gridcolor": GRID, "domain": [0.0, 0.30], "rangemode": "tozero"}
    layout["xaxis"] |= {"anchor": "y3"}
    _mark(layout, history, axis, shades)
    return {"data": data, "layout": layout}


def _panel(
    places: list[float], values: list[float | None], name: str, colour: str, axis: str, *, legend: bool = False
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": places,
        "y": values,
        "yaxis": axis,
        "showlegend": legend,
        "line": {"color": colour, "width": 2},
    }


def timeline(history: History, axis: Axis, shades: Mapping[str, str]) -> Figure:
    """What ran when, a bar for each stretch in a configuration, and every pause below."""
    kinds = [kind for kind in LANES if any(pause.kind == kind for pause in history.pauses)]
    lanes = [LANES[kind] for kind in kinds]
    whole = max(history.end - history.begin, 1e-9)
    data = []
    for layout_name, colour in shades.items():
        spans = [span for span in history.spans if span.configuration.layout.label == layout_name]
        if spans:
            wide = [(span.last_seconds - span.first_seconds) / whole > 0.07 for span in spans]
            short = [f"B{span.configuration.global_batch} m{span.configuration.micro_batch}" for span in spans]
            data.append(
                _bars(
                    [(span.first_seconds, span.last_seconds, text(span.configuration.label)) for span in spans],
                    axis,
                    "training",
                    colour,
                    text(layout_name),
                )
                | {
                    "text": [label if fits else "" for label, fits in zip(short, wide, strict=True)],
                    "textposition": "inside",
                    "insidetextanchor": "middle",
                    "textangle": 0,
                    "showlegend": True,
                    "marker": {"color": colour, "line": {"color": PAGE, "width": 1}},
                }
            )
    for kind, lane in zip(kinds, lanes, strict=True):
        pauses = [pause for pause in history.pauses if pause.kind == kind]
        bars = [(pause.begin, pause.end, text(pause.text)) for pause in thinned(pauses)]
        data.append(_bars(bars, axis, lane, ACCENT if kind == "moving" else MUTED, KIND_WORDS[kind]))
    layout = plot_layout(axis, "", height=130 + 34 * (len(lanes) + 1))
    layout["yaxis"] |= {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [*lanes, "training"],
        "gridcolor": PAGE,
        "title": {"text": ""},
        "automargin": True,
    }
    layout |= {"barmode": "overlay", "hovermode": "closest", "bargap": 0.25}
    return {"data": data, "layout": layout}


def _bars(stretches: list[tuple[float, float, str]], axis: Axis, lane: str, colour: str, name: str) -> Figure:
    begins = [axis.place(0, begin) for begin, _, _ in stretches]
    lengths = [axis.place(0, end) - begin for (_, end, _), begin in zip(stretches, begins, strict=True)]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [lane] * len(stretches),
        "base": [short(begin, 7) for begin in begins],
        "x": [short(length) for length in lengths],
        "hovertext": [f"{words}<br>{duration(end - begin)}" for begin, end, words in stretches],
        "hoverinfo": "text",
        "marker": {"color": colour, "line": {"color": colour, "width": 1.5}},  # the line keeps milliseconds visible
        "showlegend": False,
    }


def lines(predicted: Mapping[str, Sequence[LinePoint]], seen: Sequence[SeenPoint], shades: Mapping[str, str]) -> Figure:
    """Samples/s over the global batch, a line for each layout; what the run saw as diamonds."""
    best = sorted(predicted, key=lambda name: -max(point.rate for point in predicted[name]))[:MOST_LINES]
    ran = {point.layout for point in seen}
    data: list[Figure] = []
    for layout_name in [name for name in predicted if name in best or name in ran]:
        points = predicted[layout_name]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": text(layout_name),
                "x": [point.batch for point in points],
                "y": [short(point.rate) for point in points],
                "line": {"color": shades[layout_name], "width": 2},
                "marker": {
                    "size": 8,
                    "color": shades[layout_name],
                    "symbol": ["circle" if _is_measured(point) else "circle-open" for point in points],
                },
                "hovertext": [
                    f"{text(layout_name)} m{point.micro_batch}: {three_digits(point.rate)} ± "
                    f"{three_digits(point.spread)} ({point.source})"
                    for point in points
                ],
                "hoverinfo": "text",
            }
        )
    if seen:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "seen in this run",
                "x": [point.batch for point in seen],
                "y": [short(point.rate) for point in seen],
                "marker": {
                    "symbol": "diamond",
                    "size": 12,
                    "color": [shades.get(point.layout, MUTED) for point in seen],
                    "line": {"color": INK, "width": 1.5},
                },
                "hovertext": [
                    f"{text(point.layout)} m{point.micro_batch}: {three_digits(point.rate)}, "
                    f"median of {point.steps} steps"
                    for point in seen
                ],
                "hoverinfo": "text",
            }
        )
    batches = sorted({point.batch for points in predicted.values() for point in points} | {p.batch for p in seen})
    rates = [point.rate for points in predicted.values() for point in points] + [point.rate for point in seen]
    layout = plot_layout(Axis("global batch (sequences)", TOKENS.place), "samples/s", height=420)
    layout["xaxis"] |= {"type": "log", "tickvals": batches, "ticktext": [str(batch) for batch in batches]}
    if max(rates) > 6 * min(rates):
        layout["yaxis"] |= powers_of_two(min(rates) / 1.3, max(rates) * 1.3)
    else:
        layout["yaxis"] |= {"rangemode": "tozero"}
    layout["hovermode"] = "closest"
    return {"data": data, "layout": layout}


def _is_measured(point: LinePoint) -> bool:
    return point.source in ("measured", "seen")


def _mark(layout: Figure, history: History, axis: Axis, shades: Mapping[str, str]) -> None:
    """Mark what ran, and let x reach from the first step to the last event."""
    layout["shapes"] = marks(history, axis, shades)
    last = axis.place(history.tokens, history.end)
    layout["xaxis"]["range"] = [-0.005 * last, 1.01 * last]


def marks(history: History, axis: Axis, shades: Mapping[str, str]) -> list[Figure]:
    """A ribbon at the foot in the colour of the layout that ran, and a line at every move."""
    moves = history.moves
    if len(moves) > MOST_MOVES:
        moves = [move for move in moves if move.event.rung == "layout"]
    shapes: list[Figure] = []
    for move in moves if len(moves) <= MOST_MOVES else []:
        place = short(axis.place(move.tokens, move.seconds), 7)
        line = {"color": MUTED, "width": 1, "dash": "solid" if move.event.rung == "layout" else "dot"}
        shapes.append({"type": "line", "xref": "x", "yref": "paper", "x0": place, "x1": place, "y0": 0, "y1": 1})
        shapes[-1] |= {"line": line, "layer": "below"}
    stretches: list[tuple[str, float, float]] = []  # neighbours in one layout as one
    for span in history.spans:
        label = span.configuration.layout.label
        ends = axis.place(span.first_tokens, span.first_seconds), axis.place(span.last_tokens, span.last_seconds)
        if stretches and stretches[-1][0] == label:
            stretches[-1] = (label, stretches[-1][1], ends[1])
        else:
            stretches.append((label, *ends))
    for label, first, last in stretches if len(stretches) <= MOST_MOVES else []:
        shapes.append({"type": "rect", "xref": "x", "x0": short(first, 7), "x1": short(last, 7), "line": {"width": 0}})
        shapes[-1] |= {"fillcolor": shades.get(label, MUTED)}
        shapes[-1] |= {"yref": "paper", "ysizemode": "pixel", "yanchor": 0, "y0": 0, "y1": 6}
    return shapes
