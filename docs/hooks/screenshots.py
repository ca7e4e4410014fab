"""The pictures of the report in these pages: `make screenshots RUN=runs/shakespeare` takes them anew, with Chromium."""

import sys
import tempfile
from pathlib import Path

from launch.report import page
from tests.browser import browser

DOCS = Path(__file__).parent.parent
PICTURES = (("report.png", 1400, False), ("report-dark.png", 1400, True), ("report-phone.png", 390, False))
"""File, width of the page, whether it is dark."""
HEIGHT = 1450
"""What of the page is shown."""


def main(run: Path) -> None:
    """Take them."""
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder) / "profile") as tab:
        report = Path(folder) / "report.html"
        report.write_text(page([run]), encoding="utf-8")
        for name, width, dark in PICTURES:
            tab.open(report, width=width, dark=dark)
            tab.picture(DOCS / name, HEIGHT)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
