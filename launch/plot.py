"""`copus plot`: a run in one picture, drawn from its own events."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copus.job import JobError
from launch.history import read_history
from launch.json_output import as_json_line
from launch.palette import LAYOUTS, LIGHT
from launch.run_directory import find_run, shown
from profiles.configuration import Configuration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = LIGHT["ink"], LIGHT["muted"], LIGHT["grid"]
TRAINING, VALIDATION, NOISE, BATCH, THROUGHPUT = (LIGHT[name] for name in ("faint", "bad", "noise", "ink", "good"))
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
"""What every picture has: muted axes, a light grid, letters that stay letters in SVG."""
SMOOTHED_STEPS = 15
"""Steps in the running median of throughput."""


@dataclass
class Series:
    """What is drawn; x is always in tokens."""

    training: list[tuple[float, float]] = field(default_factory=list)
    """Tokens, loss."""
    validation: list[tuple[float, float]] = field(default_factory=list)
    """Tokens, loss."""
    noise: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Tokens, value, low, high, in sequences; high is NaN where it is unbounded."""
    batch: list[tuple[float, float]] = field(default_factory=list)
    """Tokens, sequences."""
    throughput: list[tuple[float, float, int]] = field(default_factory=list)
    """Tokens, sequences a second, number of the span that the step ran in."""
    spans: list[tuple[float, float, Configuration]] = field(default_factory=list)
    """From and to (tokens), and what ran there."""
    moves: list[tuple[float, bool]] = field(default_factory=list)
    """Tokens, and whether the layout changed."""


def plot(run_text: str | None, output: Path | None, *, as_json: bool = False) -> int:
    """Draw a run to a file. Raises JobError without matplotlib, without steps, or if the file cannot be written."""
    run = find_run(run_text)
    output = output or run / "plot.png"
    check_output("--output", output)
    series = series_of(run)
    if not series.training:
        raise JobError(f"{shown(run)}: no step has been trained yet, there is nothing to draw")
    need_matplotlib("copus plot")
    save(draw(series, title=run.name), output, "--output")
    print(as_json_line({"output": str(output)}) if as_json else shown(output.absolute()))
    return 0


def series_of(run: Path) -> Series:
    """What is drawn of a run."""
    history = read_history(run)
    open_ended = float("nan")
    return Series(
        training=[(step.tokens, step.loss) for step in history.steps if step.loss is not None],
        validation=[(evaluation.tokens, evaluation.loss) for evaluation in history.evaluations],
        noise=[
            (noise.tokens, noise.value, noise.low, open_ended if noise.high is None else noise.high)
            for noise in history.noise
            if noise.low is not None
        ],
        batch=[(step.tokens, step.batch) for step in history.steps],
        throughput=[(step.tokens, step.batch / step.duration, step.span) for step in history.steps],
        spans=[(span.first_tokens, span.last_tokens, span.configuration) for span in history.spans],
        moves=[(move.tokens, move.event.rung == "layout") for move in history.moves],
    )


def draw(series: Series, title: str) -> "Figure":
    """The four panels."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with rc_context(STYLE):
        figure = Figure(figsize=(9, 8.2), layout="constrained")
        axes = figure.subplots(4, 1, sharex=True, height_ratios=[3, 3, 1, 2])
        _draw_loss(axes[0], series)
        _draw_noise(axes[1], series)
        _draw_layouts(axes[2], series)
        _draw_throughput(axes[3], series)
        for panel in axes:
            for tokens, layout_changed in series.moves:
                panel.axvline(tokens, color=INK, linewidth=0.8, alpha=0.55 if layout_changed else 0.18, zorder=0.5)
        axes[0].set_title(title, loc="left", fontweight="bold", fontsize=11)
        axes[3].set_xlabel("tokens")
        axes[3].xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes[3].set_xlim(series.spans[0][0] if series.spans else 0, series.batch[-1][0])
        figure.align_ylabels(axes)
    return figure


def _draw_loss(panel: "Axes", series: Series) -> None:
    panel.plot(*_columns(series.training), color=TRAINING, linewidth=0.9, label="training")
    if series.validation:
        panel.plot(
            *_columns(series.validation),
            color=VALIDATION,
            marker="o",
            markersize=3.5,
            linewidth=1.6,
            label="validation",
        )
    panel.set_ylabel("loss (nats per token)")
    panel.legend(loc="upper right", ncols=2)


def _draw_noise(panel: "Axes", series: Series) -> None:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    shown_values = [batch for _, batch in series.batch]
    if series.noise:
        tokens, value, low, high = _columns(series.noise)
        shown_values += value
        floor, top = (
            min(shown_values) / 100,
            max(shown_values) * 100,
        )  # outside of the panel: a log axis has neither 0 nor ∞
        shown_low = [max(bound, floor) for bound in low]
        shown_high = [bound if bound == bound else top for bound in high]
        panel.fill_between(tokens, shown_low, shown_high, color=NOISE, alpha=0.16, linewidth=0, label="90 % interval")
        panel.plot(tokens, value, color=NOISE, linewidth=1.4, label="noise scale $B_{simple}$")
    panel.step(*_columns(series.batch), where="pre", color=BATCH, linewidth=1.8, label="global batch")
    panel.set_yscale("log", base=2)
    panel.set_ylim(min(shown_values) / 1.6, max(shown_values) * 1.6)
    panel.yaxis.set_major_locator(LogLocator(base=2, numticks=9))
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.minorticks_off()
    panel.set_ylabel("sequences")
    panel.legend(loc="lower right", ncols=3)


def _draw_layouts(panel: "Axes", series: Series) -> None:
    colours: dict[str, str] = {}
    whole = max(series.batch[-1][0] - series.spans[0][0], 1) if series.spans else 1
    for first, last, configuration in _merged(series.spans):
        label = configuration.layout.label
        colour = colours.setdefault(label, LAYOUTS[len(colours) % len(LAYOUTS)])
        shade = max(0.45, 1 - 0.12 * configuration.micro_batch.bit_length())
        panel.axvspan(first, last, color=colour, alpha=shade, linewidth=0)
        share = (last - first) / whole
        if share > 0.14:
            text, size = f"{label}\nmicro-batch {configuration.micro_batch}", 8.0
        elif share > 0.025:
            text, size = f"{label}·m{configuration.micro_batch}".replace("·", "\n"), 6.5
        else:  # no room for letters
            continue
        middle, place = (first + last) / 2, panel.get_xaxis_transform()
        panel.text(middle, 0.5, text, ha="center", va="center", fontsize=size, linespacing=1.05, transform=place)
    panel.set_ylim(0, 1)
    panel.set_yticks([])
    panel.grid(visible=False)
    panel.set_ylabel("layout")


def _merged(spans: list[tuple[float, float, Configuration]]) -> list[tuple[float, float, Configuration]]:
    """Neighbours that differ in the global batch alone become one span."""
    merged: list[tuple[float, float, Configuration]] = []
    for first, last, configuration in spans:
        before = merged[-1] if merged else None
        if before and (before[2].layout, before[2].micro_batch) == (configuration.layout, configuration.micro_batch):
            merged[-1] = (before[0], last, configuration)
        else:
            merged.append((first, last, configuration))
    return merged


def _draw_throughput(panel: "Axes", series: Series) -> None:
    tokens, rate, _ = _columns(series.throughput)
    panel.plot(tokens, rate, color=THROUGHPUT, linewidth=0.6, alpha=0.3)
    panel.plot(tokens, smoothed(series.throughput), color=THROUGHPUT, linewidth=1.6)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("samples/s")


def smoothed(throughput: list[tuple[float, float, int]]) -> list[float]:
    """Running median of the throughput inside each span: what ran before a move says nothing about what comes after."""
    from statistics import median

    result = []
    for place, (_, _, span) in enumerate(throughput):
        near = throughput[max(0, place - SMOOTHED_STEPS // 2) : place + SMOOTHED_STEPS // 2 + 1]
        result.append(median(rate for _, rate, other in near if other == span))
    return result


def _columns(rows: list[Any]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]


def check_output(option: str, output: Path) -> None:
    """Raise JobError for a file that is no picture by its name."""
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise JobError(f"{option} {output}: expected a name that ends in .png, .svg or .pdf")


def need_matplotlib(command: str) -> None:
    """Make matplotlib draw to files only. Raises JobError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise JobError(f"{command} needs matplotlib: pip install 'copus[plot]'") from None
    matplotlib.use("Agg")


def save(figure: "Figure", output: Path, option: str) -> None:
    """Write the picture whole or not at all. Raises JobError, naming the option, if it cannot be written."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=output.absolute().parent, suffix=output.suffix)
        os.close(descriptor)
        try:
            figure.savefig(temporary, dpi=160)
            os.chmod(temporary, 0o644)
            os.replace(temporary, output)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise JobError(f"{option} {output}: {error.strerror}") from None
