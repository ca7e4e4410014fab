"""`copus watch`: a run while it goes on, from its run directory alone, wherever its workers are."""

import time
from typing import TYPE_CHECKING

from copus.job import JobError
from launch.follow import Follower
from launch.json_output import as_json_line
from launch.run_directory import find_run
from launch.runs import RunSummary, as_values
from launch.watched import Watched

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_SECONDS = 1.0
"""Time between two looks at the run."""


def watch(run_text: str | None, *, once: bool = False, as_json: bool = False, web: bool = False) -> int:
    """Show a run until it has ended. Returns 1 if it failed or crashed. Raises JobError if there is no such run.

    As JSON it is a stream, an object a line whenever something has changed; with `once` a single object.
    """
    run = find_run(run_text)
    if web:
        if once or as_json:
            raise JobError("--web is a page in a browser: leave out --once and --json")
        from launch.web import serve

        return serve(run)
    follower, watched = Follower(run), Watched(run)
    watched.update(follower.read())
    if as_json:
        _stream(follower, watched, once)
        return 1 if watched.state.name in ("failed", "crashed") else 0
    from launch.progress import SteadyConsole

    console = SteadyConsole(highlight=False)
    if once:
        from launch.watch_frame import frame

        console.print(frame(watched, console.width))
    elif console.is_terminal:
        _live(follower, watched, console)
    else:
        _lines(follower, watched, console)
    return 1 if watched.state.name in ("failed", "crashed") else 0


def frame_as_values(watched: Watched) -> dict[str, object]:
    """What one frame shows as plain values, for `--json`."""
    status, changed = watched.status, watched.status.time or 0.0
    noise = status.noise
    return {
        **as_values(RunSummary(watched.run, watched.state, status, changed)),
        "noise": {name: getattr(noise, name) if noise else None for name in ("value", "low", "high")},
        "samples_per_second": status.samples_per_second,
        "predicted_samples_per_second": watched.predicted,
        "remaining_seconds": status.remaining_seconds if watched.state.alive else None,
        "alternatives": [candidate.model_dump(mode="json") for candidate in watched.alternatives()],
        "events": list(watched.told),
    }


def _stream(follower: Follower, watched: Watched, once: bool) -> None:
    """An object a line for each change, until the run has ended."""
    said: dict[str, object] = {}
    while True:
        values = frame_as_values(watched)
        if values != said:
            print(as_json_line(values), flush=True)
            said = values
        if once or not watched.state.alive:
            return
        time.sleep(REFRESH_SECONDS)
        watched.update(follower.read())


def _live(follower: Follower, watched: Watched, console: "Console") -> None:
    """Redraw until the run has ended; the last frame stays."""
    from rich.live import Live

    from launch.watch_frame import frame

    with Live(console=console, auto_refresh=False, get_renderable=lambda: frame(watched, console.width)) as live:
        live.refresh()
        while watched.state.alive:
            time.sleep(REFRESH_SECONDS)
            watched.update(follower.read())
            live.refresh()


def _lines(follower: Follower, watched: Watched, console: "Console") -> None:
    """A line for each change, for a pipe or a file."""
    from launch.watch_frame import headline

    said = ""
    while True:
        for line in watched.news():
            console.print(line, markup=False, soft_wrap=True)
        if watched.state.name != said:
            console.print(headline(watched), markup=False, soft_wrap=True)
            said = watched.state.name
        if not watched.state.alive:
            return
        time.sleep(REFRESH_SECONDS)
        watched.update(follower.read())
