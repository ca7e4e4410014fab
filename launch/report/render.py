"""A page from its template and what is to be said in it."""

import json
import time
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from launch.palette import DARK, LIGHT

TEMPLATES = files("launch.report") / "templates"


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    kind: str = "number"
    """How it is set: `number` to the right, `name` without breaks, `words`."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    cells: list[str]
    colour: str = ""
    """Of the little square before the first cell; none where empty."""
    mark: str = ""
    """`chosen` or `current`, where it is that."""
    width: float = 0.0
    """Percent of the bar above the table that are this row's."""


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    columns: list[Column]
    rows: list[Row]


@dataclass
class Content:
    """What a template is filled with."""

    title: str
    summary: list[str]
    """Sentences."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name → plotly figure."""
    data: dict[str, Any] = field(default_factory=dict)
    """What else the page's script needs, as plain values."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Name → why there is nothing to see, for every figure or table that is not there."""
    values: dict[str, Any] = field(default_factory=dict)
    """Everything else, by the name that the template knows."""


def render(template: str, content: Content, *, live: bool = False, library: bool = True) -> str:
    """The page as text."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(
        content.values,
        title=content.title,
        summary=content.summary,
        figures=content.figures,
        figures_json=_embedded({"figures": content.figures, **content.data}),
        reasons=content.reasons,
        css=_variables() + _template("page.css"),
        js=_template("page.js"),
        plotly=_plotly() if library and (content.figures or live) else "",
        live=live,
        version=_version(),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def _embedded(values: dict[str, Any]) -> str:
    """JSON that can stand inside of a `<script>`."""
    return json.dumps(values, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")


def _variables() -> str:
    """The palette as CSS variables, for a light and for a dark page."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in colours.items()) for colours in (LIGHT, DARK))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _version() -> str:
    try:
        return version("copus")
    except PackageNotFoundError:
        return "(not installed)"
