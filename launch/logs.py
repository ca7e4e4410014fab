"""`copus logs`: what the workers of a run wrote, wherever they ran."""

import sys

from launch.engines import engine_of_run
from launch.run_directory import find_run, shown


def logs(run_text: str, rank: int | None, *, follow: bool) -> int:
    """Print the lines. Raises JobError where there is no such run, or its engine cannot be asked."""
    run = find_run(run_text)
    silent = True
    for line in engine_of_run(run).logs(run, rank, follow=follow):
        print(line, flush=follow)
        silent = False
    if silent:
        who = "the workers" if rank is None else f"rank {rank}"
        print(f"{who} printed nothing; copus watch {shown(run)} shows what the run does", file=sys.stderr)
    return 0
