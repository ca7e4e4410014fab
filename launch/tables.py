"""Tables for people: what all rows share is said once, above, and a narrow terminal goes without some columns. And what
panels of live figures consist of."""

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is loaded when something is printed
    from rich.console import Console
    from rich.table import Table

Row = Mapping[str, str]
"""Cells by their column; all rows of a table have the same columns, in the same order."""


def page(stderr: bool = False) -> "Console":
    """Standard output, or standard error, for people."""
    from rich.console import Console

    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 200  # a file or a pipe has no width to fit into
    return console


PASTED = "job file"
"""The name of a fact that people paste into a job file."""


def print_facts(heading: str, facts: "Sequence[tuple[str, str]]", console: "Console") -> None:
    """Print a heading, and below it a line for each name and value. On a terminal both wrap between words, the values
    beside their names; in a pipe or a file every one is a whole line, as is on a terminal what is to be pasted."""
    lines = _wrapped(heading, "", console)
    for name, value in facts:
        start = f"  {name:<10} "
        lines += [start + value] if name == PASTED else _wrapped(value, start, console)
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def _wrapped(text: str, start: str, console: "Console") -> list[str]:
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return [start + text]
    indent = " " * (len(start) or 2)
    return textwrap.wrap(
        text,
        console.width,
        initial_indent=start,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def fitted(make: "Callable[[Sequence[str]], Table]", dispensable: Sequence[str], width: int) -> "Table":
    """What `make` makes, told which columns to leave out: as few of `dispensable`, from its first on, as the width asks
    for."""
    for gone in range(len(dispensable) + 1):
        table = make(dispensable[:gone])
        if _least_width(table) <= width:
            break
    return table


def _least_width(table: "Table") -> int:
    """Characters that it needs, where what may wrap does."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).minimum


def print_table(
    title: str,
    rows: Sequence[Row],
    console: "Console",
    dispensable: Sequence[str] = (),
    *,
    bold: int | None = None,
    wrapping: str | None = None,
) -> None:
    """Print one row or more below a title. `bold` is the index of a row that stands out, `wrapping` the one column that
    may wrap between words."""
    same = {name: rows[0][name] for name in rows[0] if len(rows) > 1 and len({row[name] for row in rows}) == 1}
    if same:
        title += f" (all: {', '.join(map(_shared_value, same, same.values()))})"

    def make(left_out: Sequence[str]) -> "Table":
        table = new_table()
        names = [name for name in rows[0] if name not in left_out and name not in same]
        for name in names:
            if name == wrapping:
                table.add_column(name)
            else:
                add_solid_column(table, name, [row[name] for row in rows])
        for index, row in enumerate(rows):
            table.add_row(*(row[name] for name in names), style="bold" if index == bold else "")
        return table

    console.print("\n".join(_wrapped(title, "", console)), style="italic", soft_wrap=True, markup=False)
    console.print(fitted(make, [name for name in dispensable if name not in same], console.width))


def _shared_value(name: str, value: str) -> str:
    """A cell that all rows share, in the title: figures and answers need the name of their column."""
    return value if value[:1].isalpha() and value not in ("yes", "no") else f"{name} {value}"


def print_columns(title: str, columns: Mapping[str, Row], console: "Console") -> None:
    """Print each row as a column under its heading, the names of the cells at the left; below each other in as many
    tables as the width of the console asks for. Headings wrap between words."""
    headings, names = list(columns), list(next(iter(columns.values())))

    def make(some: Sequence[str]) -> "Table":
        table = new_table()
        add_solid_column(table, "", names)
        for heading in some:
            add_solid_column(table, heading.replace(" ", "\n", 1), list(columns[heading].values()), right=True)
        for name in names:
            table.add_row(name, *(columns[heading][name] for heading in some))
        return table

    console.print("\n".join(_wrapped(title, "", console)), style="italic", soft_wrap=True, markup=False)
    while headings:
        count = len(headings)
        while count > 1 and _least_width(make(headings[:count])) > console.width:
            count -= 1
        console.print(make(headings[:count]))
        headings = headings[count:]


def add_solid_column(table: "Table", heading: str, cells: Sequence[str], right: bool = False) -> None:
    """A column that does not wrap, of which rich would else count the longest word only."""
    from rich.cells import cell_len

    width = max(map(cell_len, [*heading.split("\n"), *cells]))
    table.add_column(heading, justify="right" if right else "left", no_wrap=True, min_width=width)


def new_table() -> "Table":
    """An empty one, as all of them look."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False)


def facts_grid(facts: Sequence[tuple[str, str]]) -> "Table":
    """Names and values of a panel, three in a line."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    cells = [cell for name, value in facts for cell in (Text(name, style="dim"), Text(value))]
    for first in range(0, len(cells), 6):
        grid.add_row(*cells[first : first + 6])
    return grid


def progress_bar(fraction: float, text: str) -> "Table":
    """A bar, and what it stands for beside it."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=1.0, completed=fraction, width=40), Text(text))
    return bar
