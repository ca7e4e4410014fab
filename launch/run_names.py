"""The names of runs, from the folder that they are in. Imports nothing heavy: the shell asks for them at every Tab."""

import os
import re
from pathlib import Path

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Of a job, and of what is put behind it in the name of a run."""


def runs_folder() -> Path:
    """The folder that runs are made in and looked for unless a command or job file says otherwise: `$COPUS_RUNS`, else
    ./runs."""
    return Path(os.environ.get("COPUS_RUNS") or "runs").expanduser()


def run_names() -> list[str]:
    """The names of the runs in `runs_folder`, sorted; none if there is no such folder. A folder whose name no run can
    have is left out: the shell would run what is in it."""
    names = (job.parent.name for job in runs_folder().glob("*/job.yaml"))
    return sorted(name for name in names if re.fullmatch(NAME, name))
