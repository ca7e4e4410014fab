"""The results of a group of runs: a row for each combination of its settings, with intervals over the seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, mean
from typing import TYPE_CHECKING, Any

from launch.group import Member, read_member
from launch.history import History, read_history
from launch.intervals import interval, interval_of_ratio
from launch.run_state import RunState, state_of
from launch.tables import print_table
from launch.wording import LIMITS
from profiles.formatting import count, duration, duration_interval

if TYPE_CHECKING:  # rich is loaded when something is printed
    from rich.console import Console

ENDS = ("finished", *LIMITS)
"""Ends of a run that trained as long as its job file says."""
OVER = (*ENDS, "diverged")
"""Ends that no further start would change."""
RATIOS = ("tokens_per_second", "seconds")
"""Figures of which the geometric mean is meant."""
DISPENSABLE = ("batch", "tokens/s", "time")
"""Columns that a narrow terminal goes without, the first one first; `--json` has them."""


@dataclass(frozen=True)
class Result:
    """A run of a group."""

    run: Path
    member: Member
    state: RunState
    ended: bool
    """Whether it trained as long as its job file says. Only these are in the means."""
    over: bool
    """Whether it needs no further start: it ended, or diverged."""
    loss: float | None
    """Of the last training step, nats per token."""
    validation_loss: float | None
    """Of the last evaluation, nats per token."""
    tokens_per_second: float | None
    """In its steps: without moves, evaluations and checkpoints."""
    seconds: float
    """From the first step to the end, without the time between a stop and a resume."""
    batch: int | None
    """Global batch at the end, sequences."""
    data: str | None
    """Digest of the prepared data."""


def read_results(runs: Sequence[Path]) -> list[Result]:
    """What became of the runs that are in a group."""
    results = []
    for run in runs:
        member = read_member(run)
        if member is not None:
            results.append(_result(read_history(run), member))
    return results


def _result(history: History, member: Member) -> Result:
    status = history.status
    training = sum(step.duration for step in history.steps)
    tokens = history.seq_len * sum(step.batch for step in history.steps)
    return Result(
        run=history.run,
        member=member,
        state=state_of(history.run, status),
        ended=status.end is not None and status.end.reason in ENDS,
        over=status.end is not None and status.end.reason in OVER,
        loss=status.step.loss if status.step else None,
        validation_loss=history.evaluations[-1].loss if history.evaluations else None,
        tokens_per_second=tokens / training if training else None,
        seconds=max(0.0, history.end),
        batch=status.configuration.global_batch if status.configuration else None,
        data=history.first_start.data if history.first_start else None,
    )


@dataclass(frozen=True)
class Mean:
    """The mean of some runs and its 90 % interval, which one run has not. Of times and rates the geometric mean."""

    value: float
    low: float | None
    high: float | None


def mean_of(results: Sequence[Result], figure: str) -> Mean | None:
    """The mean of a figure (a field of `Result`) over the runs that ended; None if none has it."""
    values = [getattr(result, figure) for result in results if result.ended]
    values = [value for value in values if value is not None]
    if not values:
        return None
    if figure in RATIOS:
        values = [max(value, 1e-9) for value in values]
        low, high = interval_of_ratio(values) or (None, None)
        return Mean(geometric_mean(values), low, high)
    low, high = interval(values) or (None, None)
    return Mean(mean(values), low, high)


def cells(results: Sequence[Result]) -> list[list[Result]]:
    """The runs of each combination of settings, which differ in their seeds alone."""
    by_settings: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for result in results:
        by_settings.setdefault(tuple(sorted(result.member.settings.items())), []).append(result)
    return list(by_settings.values())


def print_results(group: str, results: Sequence[Result], console: "Console") -> None:
    """Print the table, and a line where its losses cannot be compared."""
    rows = [_row(cell) for cell in cells(results)]
    fields = dict.fromkeys(field for result in results for field in result.member.settings)
    rows = [{field: row.get(field, "–") for field in (*fields, *row)} for row in rows]
    title = f"{group}: mean over the runs that ended, with its 90 % interval"
    print_table(title, rows, console, DISPENSABLE)
    if len({result.data for result in results if result.data}) > 1:
        console.print("The losses cannot be compared: these runs were trained on different data.", soft_wrap=True)


def _row(cell: Sequence[Result]) -> dict[str, str]:
    batches = sorted({result.batch for result in cell if result.ended and result.batch is not None})
    seconds = mean_of(cell, "seconds")
    return cell[0].member.settings | {
        "ended": f"{sum(result.ended for result in cell)} of {len(cell)}",
        "loss": _figure(mean_of(cell, "loss"), 3),
        "validation": _figure(mean_of(cell, "validation_loss"), 3),
        "tokens/s": _figure(mean_of(cell, "tokens_per_second"), None),
        "time": "–" if seconds is None else _time(seconds),
        "batch": "–".join(map(str, dict.fromkeys((batches[0], batches[-1])))) if batches else "–",
    }


def _figure(figure: Mean | None, decimals: int | None) -> str:
    """`3.214 (3.202–3.226)`; with `decimals` None as counts are written."""
    if figure is None:
        return "–"

    def text(value: float) -> str:
        return count(value) if decimals is None else f"{value:.{decimals}f}"

    ends = "" if figure.low is None or figure.high is None else f" ({text(figure.low)}–{text(figure.high)})"
    return text(figure.value) + ends


def _time(seconds: Mean) -> str:
    if seconds.low is None or seconds.high is None:
        return duration(seconds.value)
    return duration_interval(seconds.value, seconds.low, seconds.high)


def as_values(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The cells as plain values, for `--json`."""
    figures = ("loss", "validation_loss", "tokens_per_second", "seconds")
    values = []
    for cell in cells(results):
        means = {figure: mean_of(cell, figure) for figure in figures}
        runs = [
            {
                "run": str(result.run),
                "seed": result.member.seed,
                "state": result.state.name,
                "why": result.state.why,
                "ended": result.ended,
                **{figure: getattr(result, figure) for figure in (*figures, "batch", "data")},
            }
            for result in cell
        ]
        values.append(
            {
                "settings": cell[0].member.settings,
                "means": {name: vars(figure) if figure else None for name, figure in means.items()},
                "runs": runs,
            }
        )
    return values
