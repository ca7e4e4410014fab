"""`copus runs`: the runs in a folder, and what each is doing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from copus.event_lines import event_lines
from copus.events import parse_event
from copus.job import JobError
from launch.group import find_group, runs_of_group
from launch.group_results import as_values as cells_as_values
from launch.group_results import print_results, read_results
from launch.json_output import as_json_line
from launch.run_names import runs_folder, runs_in
from launch.run_state import RunState, state_of
from launch.status import RunStatus
from launch.tables import add_solid_column, fitted, new_table, page
from launch.wording import describe_loss
from profiles.formatting import count, duration, percent

if TYPE_CHECKING:  # rich is loaded when something is printed
    from rich.table import Table

WORDS = ("run", "state", "layout")
"""Columns that are no figures."""
DISPENSABLE = ("moves", "loss", "layout", "batch", "tokens")
"""Columns that a narrow terminal goes without, the first one first; `--json` has them."""
ALL_COUNT = ("start", "reconfigure", "trial", "failure", "end")
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


def runs(folder: Path | None, group_text: str | None = None, *, as_json: bool = False) -> int:
    """Print the runs in a folder (`runs_folder`), the newest first; of a group its runs and their results. Raises
    JobError where there is no such folder, or no such group in it."""
    folder, group = (folder or runs_folder(), None) if group_text is None else find_group(group_text, folder)
    try:
        if group is None:
            chosen = list(runs_in(folder.expanduser().absolute()))
        else:
            chosen = runs_of_group(folder.expanduser(), group)
        summaries = [summary_of(run) for run in chosen]
        if not summaries and not folder.expanduser().is_dir():
            raise FileNotFoundError(2, "there is no such folder")
    except OSError as error:
        raise JobError(f"no runs in {folder}: {error.strerror}") from None
    summaries.sort(key=lambda summary: summary.changed, reverse=True)
    results = read_results(chosen) if group is not None else []
    if as_json:
        values = {"folder": str(folder.expanduser().absolute()), "runs": [as_values(summary) for summary in summaries]}
        print(as_json_line(values | ({"group": group, "cells": cells_as_values(results)} if results else {})))
    elif not summaries:
        print(f"no runs in {folder}: a run is a folder with a job.yaml in it")
    else:
        _print(summaries)
        if group is not None and any(result.ended for result in results):
            print_results(group, results, page())
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


def as_values(summary: RunSummary) -> dict[str, object]:
    """A run as plain values, for `--json`."""
    status, configuration = summary.status, summary.status.configuration
    return {
        "run": str(summary.run),
        "state": summary.state.name,
        "why": summary.state.why,
        "alive": summary.state.alive,
        "progress": status.fraction,
        "samples_consumed": status.samples_consumed,
        "tokens": status.samples_consumed * status.start.seq_len if status.start else 0,
        "loss": status.step.loss if status.step else None,
        "validation_loss": status.evaluation.loss if status.evaluation else None,
        "configuration": configuration.model_dump(mode="json") if configuration else None,
        "label": configuration.label if configuration else None,
        "moves": len(status.moves),
        "changed": summary.changed,
    }


STYLES = {
    **dict.fromkeys(("running", "measuring"), "green"),
    **dict.fromkeys(("failed", "crashed"), "red"),
    **dict.fromkeys(("stalled", "unknown"), "yellow"),
}
"""Colours of states that deserve one."""


def _print(summaries: list[RunSummary]) -> None:
    from rich.text import Text

    now = time.time()
    rows = [_row(summary, now) for summary in summaries]

    def make(left_out: Sequence[str]) -> "Table":
        table = new_table()
        names = [name for name in rows[0] if name not in left_out]
        for name in names:
            add_solid_column(table, name, [row[name] for row in rows], right=name not in WORDS)
        for summary, row in zip(summaries, rows, strict=True):
            style = STYLES.get(summary.state.name, "")
            table.add_row(*(Text(row[name], style=style if name == "state" else "") for name in names))
        return table

    console = page()
    console.print(fitted(make, DISPENSABLE, console.width))
    for summary in summaries:
        if summary.state.why and summary.state.name in ("failed", "crashed", "stalled", "unknown"):
            console.print(Text(f"{summary.run.name} {summary.state.name}: {summary.state.why}"), soft_wrap=True)


def _row(summary: RunSummary, now: float) -> dict[str, str]:
    status, configuration = summary.status, summary.status.configuration
    return {
        "run": summary.run.name,
        "state": summary.state.name,
        "done": percent(status.fraction) if status.start else "–",
        "tokens": count(status.samples_consumed * status.start.seq_len) if status.start else "–",
        "loss": describe_loss(status.step.loss) if status.step else "–",
        "validation": describe_loss(status.evaluation.loss) if status.evaluation else "–",
        "batch": str(configuration.global_batch) if configuration else "–",
        "layout": f"{configuration.layout.label} m{configuration.micro_batch}" if configuration else "–",
        "moves": str(len(status.moves)) if status.start else "–",
        "last event": f"{duration(max(0.0, now - summary.changed))} ago",
    }
