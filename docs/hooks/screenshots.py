"""The pictures in these pages: `make screenshots RUN=runs/shakespeare` takes them anew, with Chromium for the report.

Terminals are SVG files of the text itself, at the two widths that the command is made for.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launch.report import page
from tests.browser import browser

DOCS = Path(__file__).parent.parent
PICTURES = (("report.png", 1400, False), ("report-dark.png", 1400, True), ("report-phone.png", 390, False))
"""File, width of the page, whether it is dark."""
HEIGHT = 1450
"""What of the page is shown."""
COLUMNS = (80, 120)
LINES = 70
"""Most lines of a terminal that are shown."""
JOB = str(DOCS.parent / "examples" / "llama-7b-h100.yaml")
TERMINALS = {
    "help": ["--help"],
    "plan": ["plan", JOB, "--price", "2"],
    "profile-show": ["profile", "show", "RUN"],
    "runs": ["runs"],
    "logs": ["logs", "RUN", "--rank", "0"],
    "watch": ["watch", "RUN", "--once"],
    "explain": ["explain", "RUN"],
    "audit": ["audit", "RUN"],
    "simulate": ["simulate", "RUN/job.yaml", "--noise", "8:128"],
    "error": ["plan", JOB, "--set", "planner.max_microbatch=4"],
}
"""Name of the picture → arguments of `copus`; RUN stands for the run's name."""
# Without rich's own format: its font comes from another host.
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg"><style>
.{unique_id}-matrix {{font: {char_height}px/{line_height}px monospace}}
.{unique_id}-title {{font: bold 18px sans-serif}}
{styles}
</style><defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def main(run: Path) -> None:
    """Take them."""
    (DOCS / "terminal").mkdir(exist_ok=True)
    for name, arguments in TERMINALS.items():
        for columns in COLUMNS:
            terminal(DOCS / "terminal" / f"{name}-{columns}.svg", arguments, columns, run)
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder) / "profile") as tab:
        report = Path(folder) / "report.html"
        report.write_text(page([run]), encoding="utf-8")
        for name, width, dark in PICTURES:
            tab.open(report, width=width, dark=dark)
            tab.picture(DOCS / name, HEIGHT)
    copus(["plot", "RUN", "--output", str(DOCS / "demo.png")], 80, run)


def terminal(picture: Path, words: list[str], columns: int, run: Path) -> None:
    """The text that a command prints on a terminal of so many columns, as an SVG file."""
    lines = copus(words, columns, run).rstrip("\n").splitlines()
    shown = lines if len(lines) <= LINES else [f"… {len(lines) - LINES + 1} lines", *lines[1 - LINES :]]
    with open(os.devnull, "w") as nowhere:
        console = Console(width=columns, record=True, file=nowhere, force_terminal=True, color_system="truecolor")
        for line in shown:
            console.print(Text.from_ansi(line), no_wrap=True, overflow="crop", crop=True)
        title = " ".join(["copus", *words]).replace(f"{DOCS.parent}/", "").replace("RUN", run.name)
        console.save_svg(str(picture), title=title, code_format=SVG, unique_id=picture.stem)


def copus(words: list[str], columns: int, run: Path) -> str:
    """Standard output and errors of the command, in colours. It runs where names of runs stand for paths, so that
    pictures name no folder of this machine."""
    words = [word.replace("RUN/", f"runs/{run.name}/").replace("RUN", run.name) for word in words]
    environment = os.environ | {"COLUMNS": str(columns), "FORCE_COLOR": "1", "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=run.parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
