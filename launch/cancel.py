"""`copus cancel`: stops a run for good, wherever it runs."""

from launch.engines import engine_of_run
from launch.json_output import as_json_line
from launch.run_directory import find_run, shown


def cancel(run_text: str, *, now: bool, as_json: bool) -> int:
    """Ask the engine. Returns at once; raises JobError where nothing of the run is queued or running."""
    run = find_run(run_text)
    done = engine_of_run(run).cancel(run, now=now)
    print(as_json_line({"run": str(run), "done": done}) if as_json else f"{shown(run)}: {done}")
    return 0
