"""What the page says that compares several runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from launch.history import History, LossAt
from launch.intervals import interval_of_ratio
from launch.report import compared, style
from launch.report.render import Column, Content, Row, Table
from launch.report.series import reached, time_shares
from launch.report.single import job_values
from launch.run_state import state_of
from profiles.formatting import count, duration, percent, signed_percent

SAME_DATA = ("data.source", "data.held_out", "data.tokenizer", "model.vocab")
"""Settings that have to be the same if a run of an older version does not say which data it was trained on."""
SAME_SEQUENCES = ("model.seq_len", "training.evaluate_sequences")
"""Settings that have to be the same for two held-out losses to be of the same sequences."""
NEVER = ("name", "launch.runs", "data.cache", "profile.table")
"""Differences that say nothing."""
SEED = "training.seed"


def comparison(histories: Sequence[History]) -> Content:
    """The page of several runs."""
    named = dict(zip(names([history.run for history in histories]), histories, strict=True))
    jobs = {name: flat(job_values(history.run)) for name, history in named.items()}
    equal, why_not = _equal_loss(named, jobs)
    other_data = _other_data(named)
    groups = groups_of(jobs)
    content = Content("Comparison of " + ", ".join(named), [other_data] if other_data else _summary(equal))
    content.values = {
        "results": _results(named, groups),
        "equal": equal,
        "differences": _differences(jobs),
        "grouped": len(set(groups.values())) < len(groups),
    }
    nothing = "None of these runs has trained a step yet."
    content.reasons = dict.fromkeys(("loss-time", "loss-tokens", "batch", "layouts"), nothing) | {
        "noise": "The noise scale of none of these runs was known yet.",
        "equal": why_not,
        "differences": "The job files are the same, but for names and places of files.",
    }
    trained = {name: history for name, history in named.items() if history.steps}
    if trained:
        time = style.time_axis(max(history.end for history in trained.values()))
        shades = style.colours(list(dict.fromkeys(name for history in trained.values() for name in history.layouts())))
        content.figures = {
            "loss-time": compared.loss(named, groups, time),
            "loss-tokens": compared.loss(named, groups, style.TOKENS),
            "batch": compared.over_time(trained, groups, time),
            "layouts": compared.layouts(trained, shades, time),
        }
    if any(history.noise for history in trained.values()):
        content.figures["noise"] = compared.over_time(trained, groups, time, noise=True)
    return content


def groups_of(jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Run → name of its group: runs whose jobs differ in the seed alone. A group has the name of its first run."""
    first: dict[str, str] = {}
    groups = {}
    for name, job in jobs.items():
        settings = {field: str(value) for field, value in job.items() if field not in (*NEVER, SEED)}
        groups[name] = first.setdefault(str(sorted(settings.items())), name)
    return groups


def names(runs: Sequence[Path]) -> list[str]:
    """Names that tell the runs apart: the folder's, with those above it where they are alike."""
    depth = 1
    while len({run.parts[-depth:] for run in runs}) < len(runs):
        depth += 1
    return ["/".join(run.parts[-depth:]) for run in runs]


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value, f"{before}{name}.") if isinstance(value, dict) and value else {f"{before}{name}": value}
        result |= inner
    return result


def differences(jobs: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Field → its value in each job, for the fields that are not the same in all."""
    fields = dict.fromkeys(field for job in jobs.values() for field in job)
    rows = {}
    for field in fields:
        texts = ["–" if field not in job else str(job[field]) for job in jobs.values()]
        if field not in NEVER and len(set(texts)) > 1:
            rows[field] = texts
    return rows


def _differences(jobs: dict[str, dict[str, Any]]) -> Table | None:
    rows = [Row([field, *texts]) for field, texts in differences(jobs).items()]
    return Table([Column("field", "name"), *(Column(name, "words") for name in jobs)], rows) if rows else None


def _results(named: dict[str, History], groups: Mapping[str, str]) -> Table:
    shades = {group: style.palette(place) for place, group in enumerate(dict.fromkeys(groups.values()))}
    columns = [Column("run", "name"), Column("state", "name"), *map(Column, ("tokens", "time", "tokens/s"))]
    columns += map(Column, ("validation", "at first", "moves"))
    columns += [Column("at the end", "name"), Column("productive time")]
    rows = []
    for name, history in named.items():
        evaluations, shares = history.evaluations, time_shares(history)
        training = sum(step.duration for step in history.steps)
        ran = history.status.configuration
        productive = [share.share for share in shares if share.kind == "training"]
        texts = [
            name,
            state_of(history.run, history.status).name,
            count(history.tokens),
            duration(max(0.0, history.end)),
            count(history.seq_len * sum(step.batch for step in history.steps) / training) if training else "–",
            f"{evaluations[-1].loss:.3f}" if evaluations else "–",
            f"{evaluations[0].loss:.3f}" if evaluations else "–",
            str(len(history.moves)),
            ran.label if ran else "–",
            percent(productive[0]) if productive else "–",
        ]
        rows.append(Row(texts, shades[groups[name]]))
    return Table(columns, rows)


def _other_data(named: dict[str, History]) -> str | None:
    """A sentence on runs that were not trained on the same data; None if none says so."""
    starts = {name: history.first_start for name, history in named.items()}
    data = {name: start.data for name, start in starts.items() if start and start.data}
    if len(set(data.values())) < 2:
        return None
    digests = ", ".join(f"{digest} in {name}" for name, digest in data.items())
    return f"The losses cannot be compared: the texts or the tokenizers of these runs differ. Their data is {digests}."


def _equal_loss(named: dict[str, History], jobs: dict[str, dict[str, Any]]) -> tuple[Table | None, str]:
    """Time and tokens to the lowest held-out loss that all runs reached; or why that cannot be said."""
    if other_data := _other_data(named):
        return None, other_data
    recorded = all(history.first_start and history.first_start.data for history in named.values())
    for field in SAME_SEQUENCES if recorded else (*SAME_DATA, *SAME_SEQUENCES):
        if len({str(job.get(field)) for job in jobs.values()}) > 1:
            return None, f"The held-out losses cannot be compared: {field} is not the same in these runs."
    if any(len(history.evaluations) < 2 for history in named.values()):
        return None, "At least two evaluations of every run are needed to say when it reached a loss."
    target = max(min(evaluation.loss for evaluation in history.evaluations) for history in named.values())
    groups = groups_of(jobs)
    points: dict[str, list[LossAt]] = {}
    for name, history in named.items():
        at = reached(history.evaluations, target)
        assert at is not None  # every run has reached the target, by its choice
        points.setdefault(groups[name], []).append(at)
    rows, first = [], None
    for place, (group, times) in enumerate(points.items()):
        seconds = [max(at.seconds, 1e-9) for at in times]
        middle = math.exp(mean(map(math.log, seconds)))
        ends = interval_of_ratio(seconds)
        first = first or middle
        texts = [
            group,
            str(len(times)),
            f"{target:.3f}",
            duration(middle),
            f"{duration(ends[0])} to {duration(ends[1])}" if ends else "–",
            "–" if place == 0 else signed_percent(middle / first - 1),
            count(mean(at.tokens for at in times)),
        ]
        rows.append(Row(texts, style.palette(place)))
    columns = [Column("run", "name"), *map(Column, ("seeds", "loss", "time", "90 % interval", "against the first"))]
    return Table([*columns, Column("tokens")], rows), ""


def _summary(equal: Table | None) -> list[str]:
    if equal is None:
        return []
    times = {row.cells[0]: row.cells[3] for row in equal.rows}
    words = ", ".join(f"{name} after {time}" for name, time in times.items())
    return [f"A validation loss of {equal.rows[0].cells[2]}, the lowest that all of them reached: {words}."]
