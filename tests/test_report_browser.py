"""The report in headless Chromium: plots are drawn, the console is silent, nothing outside is asked for."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from told_run import HOSTILE, write_told_run

from benchmarks.report_size import write_long_run
from launch.report import page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

PLOTS = ["beta2", "efficiency", "grad-norm", "lines", "lr", "overview-time", "predictions", "speed"]
DRAWN = """
Object.fromEntries([...document.querySelectorAll("figure:not([hidden]) > .plot")].map(plot => [plot.id, [
  Math.round(plot.querySelector("svg.main-svg").getBoundingClientRect().width),
  [...plot.querySelectorAll("path.js-line, .points path, path.js-fill, .point path")]
    .filter(path => { const box = path.getBBox(); return box.width + box.height > 0; }).length,
]]))
"""
"""Plot → its width on the page, and how many of its curves, markers and bars have a size."""
INVALID = """
[...document.querySelectorAll("figure:not([hidden]) > .plot")].flatMap(plot =>
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
    assert [name for name, (wide, marks) in drawn.items() if wide < 300 or marks < 1] == []
    assert drawn["overview-time"][1] > 5
    assert tab.evaluate(INVALID) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.title") == "told"  # the hostile text of the run did not run
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = tab.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    assert (brightness(background) < brightness(ink)) == dark
    assert tab.requests == [report.as_uri()]
    assert tab.complaints == []


def test_the_slider_and_the_views_work(tab: Browser, report: Path) -> None:
    tab.open(report, width=1400)
    output = "document.querySelector('#maps output').textContent"
    assert tab.evaluate(output).startswith("decision 1 of 2, after 5.25 k tokens: moves to TP1·PP1·DP2 B16 m2")
    tab.evaluate("document.querySelector('[data-step=\"1\"]').click()")
    assert "stays in" in tab.evaluate(output)
    assert tab.evaluate("document.querySelectorAll('.heat td.chosen').length") == 1
    assert tab.evaluate("document.querySelector('#maps dd:last-child').textContent") == HOSTILE
    tab.evaluate("document.querySelector('[data-view=overview-tokens]').click()")
    assert "overview-time" not in (drawn := tab.evaluate(DRAWN))
    assert drawn["overview-tokens"][1] > 5
    assert tab.complaints == []


def test_a_run_of_thirty_moves_fits_four_thousand_pixels(tab: Browser, tmp_path: Path) -> None:
    run = write_long_run(tmp_path / "long", steps=600, moves=30)
    path = tmp_path / "long.html"
    path.write_text(page([run]))
    tab.open(path, width=1400)
    assert tab.evaluate("document.documentElement.scrollHeight") <= 4000
    assert tab.evaluate("document.querySelector('summary').textContent") == "the last decision in full"
    assert (tab.requests, tab.complaints) == ([path.as_uri()], [])


def test_a_comparison_is_drawn(tab: Browser, tmp_path: Path) -> None:
    path = tmp_path / "comparison.html"
    path.write_text(page([write_told_run(tmp_path / "fast"), write_told_run(tmp_path / "slow", slower=2.0)]))
    tab.open(path)
    drawn = tab.evaluate(DRAWN)
    assert sorted(drawn) == ["batch", "layouts", "loss-time", "loss-tokens", "noise"]
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
