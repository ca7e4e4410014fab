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

from copus.job import load_job
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
JOB = "examples/llama-7b-h100.yaml"
TERMINALS = {
    "help": ["--help"],
    "plan": ["plan", JOB, "--price", "2"],
    "profile-show": ["profile", "show", "NAME"],
    "runs": ["runs"],
    "logs": ["logs", "NAME", "--rank", "0"],
    "watch": ["watch", "NAME", "--once"],
    "explain": ["explain", "NAME"],
    "audit": ["audit", "NAME"],
    "simulate": ["simulate", "runs/NAME/job.yaml", "--noise", "8:128"],
    "error": ["plan", JOB, "--set", "planner.max_microbatch=4"],
}
"""Name of the picture → arguments of `copus`; NAME stands for that of the job."""
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
    name = load_job(run / "job.yaml").name
    with tempfile.TemporaryDirectory() as clone:
        # Looks like a clone with this run, so that pictures name no folder of this machine.
        folder = Path(clone)
        (folder / "runs").mkdir()
        (folder / "runs" / name).symlink_to(run)
        (folder / "examples").symlink_to(DOCS.parent / "examples")
        for picture, arguments in TERMINALS.items():
            words = [word.replace("NAME", name) for word in arguments]
            for columns in COLUMNS:
                terminal(DOCS / "terminal" / f"{picture}-{columns}.svg", words, columns, folder)
        copus(["plot", name, "--output", str(DOCS / "demo.png")], 80, folder)
        report = folder / "report.html"
        report.write_text(page([folder / "runs" / name]), encoding="utf-8")
        with browser(folder / "profile") as tab:
            for file, width, dark in PICTURES:
                tab.open(report, width=width, dark=dark)
                tab.picture(DOCS / file, HEIGHT)


def terminal(picture: Path, words: list[str], columns: int, folder: Path) -> None:
    """The text that a command prints on a terminal of so many columns, as an SVG file."""
    printed = [Text.from_ansi(line) for line in copus(words, columns, folder).rstrip("\n").splitlines()]
    lines = [part for line in printed for part in line.divide(range(columns, len(line), columns))]
    if len(lines) > LINES:
        lines = [Text(f"… {len(lines) - LINES + 1} lines"), *lines[1 - LINES :]]
    with open(os.devnull, "w") as nowhere:
        console = Console(width=columns, record=True, file=nowhere, force_terminal=True, color_system="truecolor")
        for part in lines:
            console.print(part, no_wrap=True, crop=True)
        console.save_svg(str(picture), title=" ".join(["copus", *words]), code_format=SVG, unique_id=picture.stem)


def copus(words: list[str], columns: int, folder: Path) -> str:
    """Standard output and errors of the command in a folder, in colours."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=folder,
        env=os.environ | {"COLUMNS": str(columns), "FORCE_COLOR": "1", "PYTHONPATH": str(DOCS.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
