"""What every plot of a report looks like: axes, colours, digits.

Colours are names of the page's own CSS variables, `var(--ink)`: the page puts in what they are in its light or dark
style. Text that comes from a run goes through `text`, since plotly reads tags in it.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Figure = dict[str, Any]
INK, MUTED, FAINT, GRID = "var(--ink)", "var(--muted)", "var(--faint)", "var(--grid)"
ACCENT, NOISE, PAGE, GOOD, BAD = "var(--accent)", "var(--noise)", "var(--page)", "var(--good)", "var(--bad)"
PALETTE = 8
"""Colours for layouts and for runs: the CSS variables `--c0` to `--c7`."""


class Axis(NamedTuple):
    """What runs along x: tokens, or time in the unit that suits the length of the run."""

    title: str
    place: Callable[[float, float], float]
    """Where something is, from its tokens and its seconds."""
    form: str = ".4~g"
    """How a place is written, in d3's way."""
    of_time: bool = False


TOKENS = Axis("tokens trained on", lambda tokens, seconds: tokens, ".4~s")


def time_axis(longest_seconds: float) -> Axis:
    """Time since training began."""
    units = ((180, 1, "seconds"), (3 * 3600, 60, "minutes"), (math.inf, 3600, "hours"))
    unit, name = next((unit, name) for limit, unit, name in units if longest_seconds < limit)
    return Axis(f"{name} since training began", lambda tokens, seconds: seconds / unit, of_time=True)


def colours(layouts: Sequence[str]) -> dict[str, str]:
    """One colour for each layout, the same in every plot."""
    return {layout: palette(place) for place, layout in enumerate(layouts)}


def palette(place: int) -> str:
    """A colour by its number; they repeat."""
    return f"var(--c{place % PALETTE})"


def labelled(*curves: tuple[str, str]) -> str:
    """Names of curves, each in its colour: what stands above a panel in place of a legend."""
    return "   ".join(f'<span style="color:{colour}">{name}</span>' for name, colour in curves)


def text(words: str) -> str:
    """Text as plotly shows it letter by letter."""
    return html.escape(words)


def plot_layout(axis: Axis, y_title: str, *, height: int) -> Figure:
    """What every plot has: quiet axes, the legend above, no frame."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 36, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "var(--sans)", "size": 13, "color": INK},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": PAGE, "bordercolor": GRID, "font": {"color": INK}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "xaxis": quiet_axis(axis.title) | {"showgrid": False, "hoverformat": axis.form},
        "yaxis": quiet_axis(y_title) | {"gridcolor": GRID},
    }


def quiet_axis(title: str) -> Figure:
    """An axis without a line of its own."""
    return {
        "title": {"text": title, "font": {"color": MUTED}, "standoff": 10},
        "linecolor": GRID,
        "tickfont": {"color": MUTED},
        "zeroline": False,
    }


def powers_of_two(floor: float, top: float) -> Figure:
    """A log axis with ticks at powers of two, not more than ten of them."""
    exponents = range(math.ceil(math.log2(floor)), math.floor(math.log2(top)) + 1)
    kept = [2.0**exponent for exponent in exponents[:: len(exponents) // 10 + 1]]
    return {
        "type": "log",
        "range": [math.log10(floor), math.log10(top)],
        "tickvals": kept,
        "ticktext": [f"{value:g}" for value in kept],
    }


def short(value: float, digits: int = 5) -> float:
    """Enough digits for a screen: they are most of the page's own size."""
    return float(f"{value:.{digits}g}")
