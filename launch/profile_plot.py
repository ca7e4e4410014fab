"""The crossing lines: throughput over global batch, a line for each layout, as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from copus.job import JobError
from launch.lines import heading, lines_of, winners
from launch.palette import LAYOUTS
from launch.plot import BATCH, MUTED, STYLE, check_output, need_matplotlib, save
from profiles.query import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 12
"""Groups that one picture has room for."""


def save_lines(groups: dict[tuple[str, ...], list[Summary]], output: Path) -> None:
    """Draw them to a file, a panel for each group. Raises JobError without matplotlib, without a time, with too many
    groups, or where the file cannot be written."""
    check_output("--plot", output)
    need_matplotlib("copus profile show --plot")
    timed = [members for members in groups.values() if lines_of(members)]
    if not timed:
        raise JobError("--plot: no row with a time, there is nothing to draw")
    if len(timed) > MOST_PANELS:
        raise JobError(
            f"--plot: {len(timed)} models and machines are more than {MOST_PANELS}: choose with --model, --hardware"
        )
    save(draw_lines(timed), output, "--plot")


def draw_lines(panels: list[list[Summary]]) -> "Figure":
    """A panel for each list of comparable summaries."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        columns = 1 if len(panels) == 1 else 2
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(7.5 * columns, 4.6 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for panel, members in zip(axes, panels, strict=False):
            _draw_panel(panel, members)
        for panel in list(axes)[len(panels) :]:
            panel.set_visible(False)
    return figure


def _draw_panel(panel: "Axes", members: list[Summary]) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    lines = lines_of(members)
    best = winners(lines)
    batches = [point.batch for point in best]
    panel.plot(
        batches,
        [point.rate for point in best],
        color=BATCH,
        linewidth=7,
        alpha=0.12,
        solid_capstyle="round",
        label="fastest",
    )
    for place, (layout, line) in enumerate(lines.items()):
        colour = LAYOUTS[place % len(LAYOUTS)]
        style = ("-", "--", ":")[place // len(LAYOUTS) % 3]
        panel.errorbar(
            [point.batch for point in line],
            [point.rate for point in line],
            yerr=[point.spread for point in line],
            color=colour,
            linestyle=style,
            marker="o",
            markersize=3.5,
            linewidth=1.5,
            capsize=2,
            label=layout,
        )
    rates = [point.rate for line in lines.values() for point in line]
    panel.set_xscale("log", base=2)
    if max(rates) > 6 * min(rates):
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(ScalarFormatter())
    else:
        panel.set_ylim(bottom=0)
    _draw_failures(panel, members, list(lines))
    panel.set_xticks(batches)
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("global batch (sequences)")
    panel.set_ylabel("samples/s")
    panel.set_title(heading(members[0].measurement), loc="left", fontsize=8)
    panel.legend(loc="best", fontsize=7, ncols=1 if len(lines) < 8 else 2)


def _draw_failures(panel: "Axes", members: list[Summary], layouts: list[str]) -> None:
    """A cross at the foot for every configuration that failed, in the colour of its layout where that has a line."""
    place = panel.get_xaxis_transform()
    shown = False
    for member in members:
        if member.measurement.failure is None:
            continue
        layout = member.measurement.configuration.layout.label
        colour = LAYOUTS[layouts.index(layout) % len(LAYOUTS)] if layout in layouts else MUTED
        height = 0.02 + 0.03 * (layouts.index(layout) if layout in layouts else len(layouts))
        batch = member.measurement.configuration.global_batch
        panel.plot(
            [batch],
            [min(height, 0.5)],
            color=colour,
            marker="x",
            markersize=5,
            linestyle="none",
            transform=place,
            label=None if shown else "failed",
        )
        shown = True
