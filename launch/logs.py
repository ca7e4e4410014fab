"""`copus logs`: what the workers of a run wrote, wherever they ran."""

import sys
from pathlib import Path

from copus.job import JobError, load_job
from launch.engines import engine_of_run
from launch.run_directory import find_run, shown, typed


def logs(run_text: str | None, rank: int | None, *, follow: bool) -> int:
    """Print the lines. Raises JobError if there is no such run or rank, or its engine cannot be asked."""
    run = find_run(run_text)
    if rank is not None:
        _check_rank(run, rank)
    silent = True
    for line in engine_of_run(run).logs(run, rank, follow=follow):
        print(line, flush=follow)
        silent = False
    if silent:
        who = "the workers" if rank is None else f"rank {rank}"
        print(f"{who} printed nothing; `copus watch {typed(run)}` shows what the run does", file=sys.stderr)
    return 0


def _check_rank(run: Path, rank: int) -> None:
    cluster = load_job(run / "job.yaml").cluster
    if not 0 <= rank < cluster.accelerators:
        raise JobError(
            f"--rank({rank}): {shown(run)} has ranks 0 to {cluster.accelerators - 1}: "
            f"cluster.nodes({cluster.nodes}) × cluster.accelerators_per_node({cluster.accelerators_per_node})"
        )
