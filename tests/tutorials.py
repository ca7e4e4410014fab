"""A tutorial as a reader follows it: the files that the page shows are written, its commands are typed, in order."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\S*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = {
    "laptop": "first-ten-minutes.md",
    "slurm": "tutorial-slurm.md",
    "fsdp": "tutorial-fsdp.md",
    "batch size": "tutorial-batch-size.md",
    "profiler": "tutorial-profiler.md",
}
"""Reader → page."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    text: str


def blocks(reader: str) -> list[Block]:
    """The blocks of a reader's page, in order."""
    return [Block(*found) for found in BLOCK.findall((ROOT / "docs" / PAGES[reader]).read_text())]


def follow(reader: str, folder: Path, environment: dict[str, str]) -> str:
    """Follow a page in a folder that looks like a fresh clone. What the commands printed.

    Blocks with a title are files, `sh` blocks are commands, and everything else is shown only.
    """
    _clone(folder)
    script = ["set -e"]
    for number, block in enumerate(blocks(reader)):
        if block.title:
            kept = folder / ".blocks" / str(number)
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(block.text)
            script += [f"mkdir -p $(dirname {block.title})", f"cp {kept} {block.title}"]
        elif block.language == "sh":
            script += ["set -x", block.text, "{ set +x; } 2>/dev/null"]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{folder / 'plugins'}", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        # What a page installs goes into a folder of the test, and needs no network.
        | {
            "PIP_TARGET": str(folder / "plugins"),
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_NO_INDEX": "1",
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    seen = {_without_figures(line) for line in done.stdout.splitlines()}
    for block in blocks(reader):
        if block.language == "text" and not block.title:
            missing = [line for line in block.text.splitlines() if _without_figures(line) not in seen]
            assert missing == [], f"the page shows {missing}, and the commands printed\n{done.stdout}"
    return done.stdout


def _without_figures(line: str) -> str:
    """A line without what differs from run to run and with the width of a table."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.,]+( [kM]\b)?", "#", line)).strip()


def _clone(folder: Path) -> None:
    """What the pages use of a clone, and this environment as its .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    venv = folder / ".venv"
    venv.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (venv / entry.name).symlink_to(entry)
    (venv / ".installed").touch()
