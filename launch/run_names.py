"""The names of runs, from the folder that they are in. Imports nothing heavy: the shell asks for them at every Tab."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Of a job, and of what is put behind it in the name of a run."""


def runs_folder() -> Path:
    """The folder that runs are made in and looked for unless a command or job file says otherwise: `$COPUS_RUNS`, else
    ./runs."""
    return Path(os.environ.get("COPUS_RUNS") or "runs").expanduser()


def runs_in(folder: Path) -> Iterator[Path]:
    """The runs in a folder; none if there is no such folder. What begins with a dot is still being made."""
    return (job.parent for job in folder.glob("*/job.yaml") if not job.parent.name.startswith("."))


def run_names() -> list[str]:
    """The names of the runs in `runs_folder`, sorted; none if there is no such folder. A folder whose name no run can
    have is left out: the shell would run what is in it."""
    return sorted(run.name for run in runs_in(runs_folder()) if re.fullmatch(NAME, run.name))
