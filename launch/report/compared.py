"""The plots of a comparison of runs. Runs of one group, which differ in their seed alone, have one colour."""

from collections.abc import Mapping, Sequence

from launch.history import History
from launch.report.figures import curve
from launch.report.series import smoothed_loss, thinned
from launch.report.style import PAGE, Axis, Figure, palette, plot_layout, powers_of_two, short, text


def loss(histories: Mapping[str, History], groups: Mapping[str, str], axis: Axis) -> Figure:
    """The validation losses of several runs over one another, with their smoothed training losses faint behind."""
    data: list[Figure] = []
    named = set[str]()
    for name, history in histories.items():
        colour, group = _colour(groups, name), groups[name]
        smooth = curve(thinned(smoothed_loss(history.steps)), axis, f"{text(name)}, training", colour, 1.5)
        data.append(smooth | {"opacity": 0.4, "legendgroup": group, "showlegend": False})
        lines = [data[-1]]
        if history.evaluations:
            held_out = curve(history.evaluations, axis, text(name), colour, 2.5, markers=True)
            lines.append(held_out | {"legendgroup": group, "showlegend": False})
            data.append(lines[-1])
        if group not in named:
            lines[-1] |= {"name": text(group), "showlegend": True}
            named.add(group)
    return {"data": data, "layout": plot_layout(axis, "loss (nats per token)", height=380)}


def _colour(groups: Mapping[str, str], name: str) -> str:
    return palette(list(dict.fromkeys(groups.values())).index(groups[name]))


def over_time(
    histories: Mapping[str, History], groups: Mapping[str, str], axis: Axis, *, noise: bool = False
) -> Figure:
    """The batches of several runs, or their noise scales, in sequences."""
    data: list[Figure] = []
    heights: list[float] = []
    for name, history in histories.items():
        if noise:
            rows = [(row.tokens, row.seconds, row.value) for row in thinned(history.noise)]
        else:
            rows = [(step.tokens, step.seconds, float(step.batch)) for step in thinned(history.steps)]
        heights += [height for _, _, height in rows]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": text(name),
                "x": [short(axis.place(tokens, seconds), 7) for tokens, seconds, _ in rows],
                "y": [short(height) for _, _, height in rows],
                "line": {"color": _colour(groups, name), "width": 2, "shape": "linear" if noise else "vh"},
                "showlegend": False,
            }
        )
    layout = plot_layout(axis, "noise scale (sequences)" if noise else "global batch (sequences)", height=280)
    if heights:
        layout["yaxis"] |= powers_of_two(min(heights) / 1.6, max(heights) * 1.6)
    return {"data": data, "layout": layout}


def layouts(histories: Mapping[str, History], shades: Mapping[str, str], axis: Axis) -> Figure:
    """What each run ran when, a lane for each."""
    data: list[Figure] = []
    for layout_name, colour in shades.items():
        bars = _stretches(histories, layout_name, axis)
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": text(layout_name),
                "y": [text(name) for name, _, _, _ in bars],
                "base": [short(begin, 7) for _, begin, _, _ in bars],
                "x": [short(end - begin) for _, begin, end, _ in bars],
                "hovertext": [words for _, _, _, words in bars],
                "hoverinfo": "text",
                "marker": {"color": colour, "line": {"color": PAGE, "width": 0.5}},
            }
        )
    layout = plot_layout(axis, "", height=110 + 30 * len(histories))
    layout["yaxis"] |= {"type": "category", "categoryorder": "array", "automargin": True, "showgrid": False}
    layout["yaxis"]["categoryarray"] = [text(name) for name in reversed(list(histories))]
    layout |= {"barmode": "overlay", "hovermode": "closest", "bargap": 0.25}
    return {"data": data, "layout": layout}


def _stretches(
    histories: Mapping[str, History], layout_name: str, axis: Axis
) -> Sequence[tuple[str, float, float, str]]:
    """Run, from, to, and words, of each stretch in a layout."""
    return [
        (
            name,
            axis.place(span.first_tokens, span.first_seconds),
            axis.place(span.last_tokens, span.last_seconds),
            text(span.configuration.label),
        )
        for name, history in histories.items()
        for span in history.spans
        if span.configuration.layout.label == layout_name
    ]
