"""Tables for people: nothing is cut off, what all rows share is said once, and columns go in their order."""

import io

import pytest
from rich.console import Console

from launch.tables import print_columns, print_table

ROWS = [
    {"layout": "TP2·PP1·DP1", "rate": "9.94 a second", "source": "predicted", "zero": "0"},
    {"layout": "TP1·PP1·DP2", "rate": "7.51 a second", "source": "predicted", "zero": "0"},
]


def printed(width: int, print_it) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_it(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_all_rows_share_is_in_the_title_alone() -> None:
    text = printed(80, lambda console: print_table("layouts", ROWS, console))
    assert text.startswith("layouts (all: predicted, zero 0)\n")
    assert text.count("predicted") == 1
    assert "9.94 a second" in text


def test_one_row_shares_nothing() -> None:
    text = printed(80, lambda console: print_table("layouts", ROWS[:1], console))
    assert text.startswith("layouts\n")
    assert "predicted" in text


@pytest.mark.parametrize(("width", "there"), [(40, True), (29, True), (28, False), (20, False)])
def test_a_column_goes_before_any_is_cut(width: int, there: bool) -> None:
    text = printed(width, lambda console: print_table("layouts", ROWS, console, ["rate"]))
    assert ("9.94 a second" in text) == there
    assert "TP2·PP1·DP1" in text
    assert "…" not in text


def test_only_what_may_wrap_does() -> None:
    rows = [row | {"verdict": "noise cannot be measured: one part per step"} for row in ROWS[:1]]
    text = printed(50, lambda console: print_table("layouts", rows, console, ["source", "zero"], wrapping="verdict"))
    assert "9.94 a second" in text
    assert all(word in text for word in rows[0]["verdict"].split())


@pytest.mark.parametrize(("width", "tables"), [(60, 1), (40, 2), (20, 4)])
def test_columns_that_do_not_fit_go_below(width: int, tables: int) -> None:
    columns = {f"TP{size} m{size}": {"weights": f"{size}.00", "sum": "123.45"} for size in (1, 2, 4, 8)}
    text = printed(width, lambda console: print_columns("memory", columns, console))
    assert text.count("weights") == tables
    assert all(f"{size}.00" in text and f"TP{size}" in text for size in (1, 2, 4, 8))
    assert "…" not in text
