"""`copus runs`: the runs in a folder, and what each is doing."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from copus.events import parse_event
from copus.job import JobError
from launch.follow import event_lines
from launch.run_state import RunState, state_of
from launch.status import RunStatus
from launch.tables import new_table
from launch.wording import count, describe_loss
from planner.wording import duration

ALL_COUNT = ("start", "reconfigure", "failure", "end")
"""Kinds of which every event matters to the state of a run."""
NEWEST_COUNTS = ("profile", "step", "evaluate", "checkpoint", "noise", "restart")
"""Kinds of which the newest does."""


@dataclass(frozen=True)
class RunSummary:
    """A run, as a row of the table."""

    run: Path
    state: RunState
    status: RunStatus
    changed: float
    """When it last wrote an event, or was made; seconds since the epoch."""


def runs(folder: Path | None, *, as_json: bool = False) -> int:
    """Print the runs in a folder (./runs), the newest first. Raises JobError where there is no such folder."""
    folder = folder or Path("runs")
    try:
        found = [summary_of(job.parent) for job in folder.expanduser().absolute().glob("*/job.yaml")]
        if not found and not folder.expanduser().is_dir():
            raise FileNotFoundError(2, "No such file or directory")
    except OSError as error:
        raise JobError(f"no runs in {folder}: {error.strerror}") from None
    found.sort(key=lambda each: each.changed, reverse=True)
    if as_json:
        print(json.dumps({"folder": str(folder.expanduser().absolute()), "runs": [as_values(each) for each in found]}))
    elif not found:
        print(f"no runs in {folder}: a run is a folder with a job.yaml in it")
    else:
        _print(found)
    return 0


def summary_of(run: Path) -> RunSummary:
    """Read what matters of a run. Most lines of its log are passed over, so that this is quick for long ones."""
    status = status_of(run)
    changed = status.time if status.time is not None else (run / "job.yaml").stat().st_mtime
    return RunSummary(run, state_of(run, status), status, changed)


def status_of(run: Path) -> RunStatus:
    """The status that all events of the log give, but for the first evaluation, from the few that it needs."""
    every: list[tuple[int, bytes]] = []
    newest: dict[str, tuple[int, bytes]] = {}
    for place, line in enumerate(event_lines(run, *ALL_COUNT, *NEWEST_COUNTS)):
        if line.kind in ALL_COUNT:
            every.append((place, line.text))
        else:
            newest[line.kind] = (place, line.text)
    kept = [text for _, text in sorted([*every, *newest.values()])]
    status = RunStatus()
    status.update(event for event in map(parse_event, kept) if event is not None)
    return status


def as_values(each: RunSummary) -> dict[str, object]:
    """A run as plain values, for `--json`."""
    status, configuration = each.status, each.status.configuration
    return {
        "run": str(each.run),
        "state": each.state.name,
        "why": each.state.why,
        "alive": each.state.alive,
        "progress": status.fraction,
        "samples_consumed": status.samples_consumed,
        "tokens": status.samples_consumed * status.start.seq_len if status.start else 0,
        "loss": status.step.loss if status.step else None,
        "validation_loss": status.evaluation.loss if status.evaluation else None,
        "configuration": configuration.model_dump(mode="json") if configuration else None,
        "label": configuration.label if configuration else None,
        "moves": len(status.moves),
        "changed": each.changed,
    }


STYLES = {
    **dict.fromkeys(("running", "measuring"), "green"),
    **dict.fromkeys(("failed", "crashed"), "red"),
    **dict.fromkeys(("stalled", "unknown"), "yellow"),
}
"""Colours of states that deserve one."""


def _print(found: list[RunSummary]) -> None:
    from rich.console import Console
    from rich.text import Text

    table = new_table()
    for name in ("run", "state"):
        table.add_column(name)
    for name in ("done", "tokens", "loss", "validation", "batch"):
        table.add_column(name, justify="right")
    table.add_column("layout")
    for name in ("moves", "last event"):
        table.add_column(name, justify="right")
    now = time.time()
    for each in found:
        status, configuration = each.status, each.status.configuration
        table.add_row(
            Text(each.run.name),
            Text(each.state.name, style=STYLES.get(each.state.name, "")),
            f"{status.fraction:.0%}" if status.start else "–",
            count(status.samples_consumed * status.start.seq_len) if status.start else "–",
            describe_loss(status.step.loss) if status.step else "–",
            describe_loss(status.evaluation.loss) if status.evaluation else "–",
            str(configuration.global_batch) if configuration else "–",
            f"{configuration.layout.label} m{configuration.micro_batch}" if configuration else "–",
            str(len(status.moves)) if status.start else "–",
            f"{duration(max(0.0, now - each.changed))} ago",
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width to fit into
    console.print(table)
    for each in found:
        if each.state.why and each.state.name in ("failed", "crashed", "stalled", "unknown"):
            console.print(Text(f"{each.run.name} {each.state.name}: {each.state.why}"), soft_wrap=True)
