"""`copus logs`: what the workers of a run wrote, wherever they ran."""

from launch.engines import engine_of_run
from launch.run_directory import find_run


def logs(run_text: str, rank: int | None, *, follow: bool) -> int:
    """Print the lines. Raises JobError where there is no such run, or its engine cannot be asked."""
    run = find_run(run_text)
    for line in engine_of_run(run).logs(run, rank, follow=follow):
        print(line, flush=follow)
    return 0
