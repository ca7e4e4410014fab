"""The names of runs, from the folder that they are in. Imports nothing heavy: the shell asks for them at every Tab."""

import os
from pathlib import Path


def runs_folder() -> Path:
    """The folder that runs are made in and looked for unless a command or job file says otherwise: `$COPUS_RUNS`, else
    ./runs."""
    return Path(os.environ.get("COPUS_RUNS") or "runs").expanduser()


def run_names() -> list[str]:
    """The names of the runs in `runs_folder`, sorted; none if there is no such folder."""
    return sorted(job.parent.name for job in runs_folder().glob("*/job.yaml"))
