"""`python -m copus.data [--verify] JOB.yaml`: prepare the data of a job, or compare it with its checksums.

Progress goes to stderr, the folder to stdout.
"""

import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from copus.data.prepare import prepare, verify
from copus.data.prepared import check_data, prepared_path
from copus.job import JobError, load_job


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 for an error that the user can fix, 130 and 143 when interrupted."""
    verifies = arguments[:1] == ["--verify"]
    paths = arguments[verifies:]
    if len(paths) != 1 or paths[0].startswith("-"):
        print("usage: python -m copus.data [--verify] JOB.yaml", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half made is left
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        job = load_job(Path(paths[0]))
        check_data(job)
        bars = Progress(*columns, console=console)
        stages = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        bars.start()
        try:
            if verifies:
                folder = prepared_path(job)
                verify(folder, show)
            else:
                folder = prepare(job, show)
        except BaseException:
            bars.live.transient = True  # a mistake prints one line and nothing else
            bars.live.stop()
            raise
        bars.stop()
    except JobError as error:
        print(f"copus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
