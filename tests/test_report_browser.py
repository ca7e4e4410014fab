"""The report in headless Chromium: plots are drawn, the console is silent, nothing outside is asked for."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from told_run import write_told_run

from launch.report import page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

PLOTS = ["loss-time", "loss-tokens", "noise", "goodput", "timeline", "lines"]
DRAWN = """
Object.fromEntries([...document.querySelectorAll(".plot")].map(plot => [plot.id, [
  Math.round(plot.querySelector("svg.main-svg").getBoundingClientRect().width),
  [...plot.querySelectorAll("path.js-line, .points path, path.js-fill, .point path")]
    .filter(path => { const box = path.getBBox(); return box.width + box.height > 0; }).length,
]]))
"""
"""Plot → its width on the page, and how many of its curves, markers and bars have a size."""
INVALID = """
[...document.querySelectorAll(".plot")].flatMap(plot =>
  (Plotly.validate(plot.data, plot.layout) || []).map(found => plot.id + ": " + found.msg))
"""
"""What plotly does not know, or cannot use, of the figures as they were handed to it."""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    path.write_text(page([write_told_run(folder / "told")]))
    return path


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_a_report_is_drawn_and_asks_for_nothing(tab: Browser, report: Path, width: int, dark: bool) -> None:
    tab.open(report, width=width, dark=dark)
    drawn = tab.evaluate(DRAWN)
    assert sorted(drawn) == sorted(PLOTS)
    assert [name for name, (wide, marks) in drawn.items() if wide < 300 or marks < 2] == []
    assert tab.evaluate(INVALID) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.title") == "told"  # the hostile text of the run did not run
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = tab.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    assert (brightness(background) < brightness(ink)) == dark
    assert tab.requests == [report.as_uri()]
    assert tab.complaints == []


def test_a_comparison_is_drawn(tab: Browser, tmp_path: Path) -> None:
    path = tmp_path / "comparison.html"
    path.write_text(page([write_told_run(tmp_path / "fast"), write_told_run(tmp_path / "slow", slower=2.0)]))
    tab.open(path)
    drawn = tab.evaluate(DRAWN)
    assert sorted(drawn) == ["batch", "loss-time", "loss-tokens"]
    assert [name for name, (wide, marks) in drawn.items() if wide < 300 or marks < 2] == []
    assert (tab.requests, tab.complaints) == ([path.as_uri()], [])


def test_the_browser_would_have_told(tab: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        "<img src='http://example.invalid/x.png'><script>console.error('oh'); throw new Error('no')</script>"
    )
    tab.open(path)
    assert "http://example.invalid/x.png" in tab.requests
    assert any("oh" in complaint for complaint in tab.complaints)
    assert any("Error: no" in complaint for complaint in tab.complaints)
    assert any("ERR_NAME_NOT_RESOLVED" in complaint for complaint in tab.complaints)


def brightness(colour: str) -> int:
    """Of `rgb(1, 2, 3)`."""
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
