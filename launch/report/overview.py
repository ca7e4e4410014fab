"""The run on one axis: loss, noise and batch, goodput, and below them what ran and what it was interrupted for.

Nothing is drawn across the panels, so fifty moves hide no curve: they are marks in a lane of their own.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from copus.events import Trial
from launch.history import History, LossAt, MoveAt, TrialAt
from launch.report.series import KIND_WORDS, GoodputAt, smoothed_loss, thinned, thinned_peaks
from launch.report.style import (
    ACCENT,
    BAD,
    FAINT,
    GOOD,
    GRID,
    INK,
    MUTED,
    NOISE,
    PAGE,
    Axis,
    Figure,
    labelled,
    plot_layout,
    powers_of_two,
    quiet_axis,
    short,
    text,
)
from launch.wording import describe_ratio
from planner.goodput import Objective
from profiles.formatting import duration

PANELS = {"y": (0.68, 0.97), "y2": (0.39, 0.63), "y3": (0.16, 0.34), "y4": (0.0, 0.12)}
"""Panel → its share of the height."""
SETTLED = 0.03
"""Share of the run whose losses do not set the axis: the first ones are far above all others."""
MOST_BARS = 1000
"""Stretches of time in a lane."""
PAUSES = {"down": BAD, "checkpoints": MUTED, "evaluating": FAINT}
"""Kinds of pauses that are drawn, with their colours. Moves have marks."""


def overview(
    history: History, rows: Sequence[GoodputAt], axis: Axis, shades: Mapping[str, str], objective: Objective
) -> Figure:
    """The figure, over time or over tokens."""
    layout = plot_layout(axis, "loss (nats per token)", height=700)
    del layout["legend"]  # the panels have headings
    layout |= {"hoversubplots": "axis", "showlegend": False, "barmode": "overlay", "bargap": 0.2}
    layout["margin"] |= {"t": 4, "r": 12}
    data = [*_loss(history, axis, layout), *_noise(history, axis, layout)]
    data += _goodput(history, rows, axis, layout, objective)
    data += _lanes(history, axis, layout, shades)
    for name, domain in PANELS.items():
        panel = layout[f"yaxis{name[1:]}"]
        panel |= {"domain": domain, "fixedrange": True}
        if name in ("y", "y3"):
            panel["nticks"] = 5
    last = axis.place(history.tokens, history.end)
    layout["xaxis"] |= {"anchor": "y4", "range": [-0.005 * last, 1.005 * last], "ticks": "outside", "tickcolor": GRID}
    return {"data": data, "layout": layout}


def _heading(layout: Figure, panel: str, *curves: tuple[str, str]) -> None:
    """Say above a panel what its curves are."""
    heading = {"xref": "paper", "yref": "paper", "x": 0, "y": PANELS[panel][1], "xanchor": "left", "yanchor": "bottom"}
    heading |= {"text": labelled(*curves), "showarrow": False, "align": "left", "font": {"size": 12.5}}
    layout.setdefault("annotations", []).append(heading)


def _curve(
    places: Sequence[float], heights: Sequence[float | None], name: str, colour: str, panel: str, width: float = 2
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [short(place, 7) for place in places],
        "y": [None if height is None else short(height) for height in heights],
        "yaxis": panel,
        "line": {"color": colour, "width": width},
    }


def _loss(history: History, axis: Axis, layout: Figure) -> list[Figure]:
    """Training loss, smoothed, and validation loss."""
    steps = [step for step in history.steps if step.loss is not None]
    smooth = thinned(smoothed_loss(steps))
    losses = [LossAt(step.tokens, step.seconds, step.loss or 0.0) for step in steps]
    raw = thinned_peaks(losses, lambda row: row.loss)
    data = []
    for rows, name, colour, width in ((raw, "training", FAINT, 1), (smooth, "smoothed", ACCENT, 2)):
        places = [axis.place(row.tokens, row.seconds) for row in rows]
        data.append(_curve(places, [row.loss for row in rows], name, colour, "y", width))
    curves = [("training", MUTED), ("smoothed", ACCENT)] if steps else [("no loss of this run was finite", BAD)]
    held_out = history.evaluations
    if held_out:
        places = [axis.place(row.tokens, row.seconds) for row in held_out]
        line = _curve(places, [row.loss for row in held_out], "validation", INK, "y")
        data.append(line | {"mode": "lines+markers", "marker": {"color": INK, "size": 6}})
        curves.append(("validation", INK))
    begin = SETTLED * history.tokens
    settled = [row.loss for row in [*smooth, *held_out] if row.tokens >= begin]
    if len(settled) > 1 and max(settled) > min(settled):
        margin = 0.12 * (max(settled) - min(settled))
        layout["yaxis"]["range"] = [short(min(settled) - margin), short(max(settled) + margin)]
    _heading(layout, "y", *curves)
    return data


def _noise(history: History, axis: Axis, layout: Figure) -> list[Figure]:
    """Noise scale with its interval, and the batch that followed it."""
    rows, steps = thinned(history.noise), thinned(history.steps)
    values = [float(step.batch) for step in steps] + [row.value for row in rows]
    floor, top = min(values) / 1.6, max(values) * 1.6
    data: list[Figure] = []
    banded = [row for row in rows if row.low is not None]
    curves = [("global batch", INK)]
    if banded:  # a log axis has neither 0 nor ∞
        places = [axis.place(row.tokens, row.seconds) for row in banded]
        high = [top * 10 if row.high is None else row.high for row in banded]
        low = [max(row.low or 0.0, floor / 10) for row in banded]
        band = _curve([*places, *reversed(places)], [*high, *reversed(low)], "90 % interval", NOISE, "y2", 0)
        data.append(band | {"fill": "toself", "fillcolor": NOISE, "opacity": 0.22, "hoverinfo": "skip"})
    if rows:
        places = [axis.place(row.tokens, row.seconds) for row in rows]
        data.append(_curve(places, [row.value for row in rows], "noise scale", NOISE, "y2"))
        curves.append(("noise scale, 90 % interval", NOISE))
    places = [axis.place(step.tokens, step.seconds) for step in steps]
    data.append(_curve(places, [step.batch for step in steps], "global batch", INK, "y2", 2.5))
    data[-1]["line"]["shape"] = "vh"
    layout["yaxis2"] = quiet_axis("sequences") | {"gridcolor": GRID} | powers_of_two(floor, top)
    _heading(layout, "y2", *curves)
    return data


def _goodput(
    history: History, rows: Sequence[GoodputAt], axis: Axis, layout: Figure, objective: Objective
) -> list[Figure]:
    """Goodput, and what it would have been in the first configuration."""
    kept = thinned(rows)
    places = [axis.place(row.tokens, row.seconds) for row in kept]
    tokens = history.seq_len

    def scaled(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else value * tokens for value in values]

    data, curves = [], [("goodput", GOOD)]
    if history.moves and any(row.unmoved is not None for row in kept):
        line = _curve(places, scaled([row.unmoved for row in kept]), "in the first configuration", MUTED, "y3", 1.5)
        line["line"]["dash"] = "dash"
        data.append(line)
        curves.append(("had it stayed in its first configuration", MUTED))
    data.append(_curve(places, scaled([row.goodput for row in kept]), "goodput", GOOD, "y3"))
    title = "tokens/s" if objective == "plain" else "tokens/s · √B"
    layout["yaxis3"] = quiet_axis(title) | {"gridcolor": GRID, "rangemode": "tozero", "hoverformat": ".3~s"}
    layout["yaxis3"]["tickformat"] = "~s"
    # A step that was far faster or slower than all others must not set the axis.
    settled = [value for row in kept for value in (row.goodput, row.unmoved) if value is not None]
    if settled and max(settled) > 3 * median(settled):
        layout["yaxis3"]["range"] = [0, short(3 * tokens * median(settled))]
    _heading(layout, "y3", *curves)
    return data


def _lanes(history: History, axis: Axis, layout: Figure, shades: Mapping[str, str]) -> list[Figure]:
    """What ran when; moves and trials; pauses. Over tokens a pause has no length, and is left out."""
    data = []
    whole = max(axis.place(history.tokens, history.end), 1e-9)
    for name, colour in shades.items():
        spans = [span for span in history.spans if span.configuration.layout.label == name]
        stretches = []
        for span in thinned(spans, MOST_BARS):
            begin = axis.place(span.first_tokens, span.first_seconds)
            end = axis.place(span.last_tokens, span.last_seconds)
            words = f"B{span.configuration.global_batch}" if (end - begin) / whole > 0.05 else ""
            stretches.append((begin, end, text(span.configuration.label), words))
        if stretches:
            bars = _bars(stretches, "ran", text(name), colour)
            bars["marker"]["line"] = {"color": PAGE, "width": 1 if len(history.spans) < 100 else 0}
            data.append(bars | {"textposition": "inside", "insidetextanchor": "middle", "textangle": 0})
    data += _marks(history, axis)
    lanes = ["moves", "ran"]
    if axis.of_time:
        for kind, colour in PAUSES.items():
            pauses = [pause for pause in history.pauses if pause.kind == kind and pause.end > 0]
            if pauses:
                stretches = [(axis.place(0, p.begin), axis.place(0, p.end), text(p.text), "") for p in pauses]
                bars = _bars(thinned(stretches, MOST_BARS), "pauses", KIND_WORDS[kind], colour)
                bars["marker"]["line"] = {"color": colour, "width": 1}  # keeps milliseconds visible
                data.append(bars)
        lanes = ["pauses", *lanes]
    layout["yaxis4"] = quiet_axis("") | {"type": "category", "categoryorder": "array", "categoryarray": lanes}
    layout["yaxis4"] |= {"range": [-0.5, len(lanes) - 0.5], "showgrid": False}
    return data


def _bars(stretches: Sequence[tuple[float, float, str, str]], lane: str, name: str, colour: str) -> Figure:
    """Bars from and to, with what they say to a pointer, and inside."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "yaxis": "y4",
        "y": [lane] * len(stretches),
        "base": [short(begin, 7) for begin, _, _, _ in stretches],
        "x": [short(end - begin) for begin, end, _, _ in stretches],
        "text": [inside for _, _, _, inside in stretches],
        "hovertext": [words for _, _, words, _ in stretches],
        "hoverinfo": "text",
        "marker": {"color": colour},
    }


def _marks(history: History, axis: Axis) -> list[Figure]:
    """Moves and trials in their lane: filled if the layout changed, hollow for a new batch or micro-batch."""
    marks: Sequence[MoveAt | TrialAt]
    groups: dict[str, tuple[str, str, Sequence[MoveAt | TrialAt]]] = {
        "move to another layout": ("triangle-up", ACCENT, [m for m in history.moves if m.event.rung == "layout"]),
        "move to another batch": ("circle-open", ACCENT, [m for m in history.moves if m.event.rung != "layout"]),
        "trial": ("x-thin-open", MUTED, history.trials),
    }
    data = []
    for name, (symbol, colour, all_marks) in groups.items():
        marks = thinned(all_marks, MOST_BARS)
        if not marks:
            continue
        words = []
        for mark in marks:
            event = mark.event
            if isinstance(event, Trial):
                said = f"{event.candidate.label}: {describe_ratio(event)}, {event.outcome}"
            else:
                said = f"{event.before.label} → {event.after.label} in {duration(event.seconds)}"
            words.append(text(said))
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "yaxis": "y4",
                "x": [short(axis.place(mark.tokens, mark.seconds), 7) for mark in marks],
                "y": ["moves"] * len(marks),
                "marker": {"symbol": symbol, "size": 9, "color": colour, "line": {"color": colour, "width": 1.5}},
                "hovertext": words,
                "hoverinfo": "text",
            }
        )
    return data
