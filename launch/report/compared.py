"""The plots of a comparison of runs."""

from collections.abc import Mapping

from launch.history import History
from launch.report.figures import curve
from launch.report.series import smoothed_loss, thinned
from launch.report.style import Axis, Figure, palette, plot_layout, powers_of_two, short, text


def loss(histories: Mapping[str, History], axis: Axis) -> Figure:
    """The validation losses of several runs over one another, with their smoothed training losses faint behind."""
    data: list[Figure] = []
    for place, (name, history) in enumerate(histories.items()):
        smooth = curve(thinned(smoothed_loss(history.steps)), axis, f"{text(name)}, training", palette(place), 1.5)
        data.append(smooth | {"opacity": 0.45, "legendgroup": str(place), "showlegend": not history.evaluations})
        if history.evaluations:
            held_out = curve(history.evaluations, axis, text(name), palette(place), 2.5, markers=True)
            data.append(held_out | {"legendgroup": str(place)})
    return {"data": data, "layout": plot_layout(axis, "loss (nats a token)", height=400)}


def batch(histories: Mapping[str, History], axis: Axis) -> Figure:
    """The batches of several runs."""
    data: list[Figure] = []
    batches: list[float] = []
    for place, (name, history) in enumerate(histories.items()):
        steps = thinned(history.steps)
        batches += [step.batch for step in steps]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": text(name),
                "x": [short(axis.place(step.tokens, step.seconds), 7) for step in steps],
                "y": [step.batch for step in steps],
                "line": {"color": palette(place), "width": 2.5, "shape": "vh"},
            }
        )
    layout = plot_layout(axis, "global batch (sequences)", height=300)
    layout["yaxis"] |= powers_of_two(min(batches) / 1.6, max(batches) * 1.6)
    return {"data": data, "layout": layout}
