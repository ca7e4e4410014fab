"""`copus explain`: what the planner saw, what it chose and why, and whether it was right about it."""

import json
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from copus.event_lines import event_lines, samples_of
from copus.events import DecisionMade, Event, Reconfigure, Start, Step, parse_event
from copus.job import JobError, load_job
from launch.run_directory import find_run, shown
from launch.tables import add_solid_column, fitted, new_table, page
from launch.wording import count, noise_interval
from planner.wording import duration, three_digits
from profiles.decision import CandidateScore, Decision

if TYPE_CHECKING:
    from rich.table import Table

BEST = 20
"""Candidates shown, unless all are asked for. The chosen and the current one are always there."""
COLUMNS = (
    *("layout", "micro-batch", "global batch", "samples/s", "±", "source", "efficiency", "goodput", "vs current"),
    *("memory", "move", "saves", "verdict"),
)
WORDS = ("layout", "source", "verdict")
"""The columns that are not figures."""
DISPENSABLE = ("memory", "±", "source", "efficiency", "move", "goodput", "saves")
"""Columns that a narrow terminal goes without, the first one first; `--json` has them."""
VERDICT_WIDTH = 24
"""Room for the verdict beside its longest word; it is wrapped."""


@dataclass(frozen=True)
class Explanation:
    """A decision and what came after it."""

    event: DecisionMade
    """The decision, and when it was taken."""
    why: str
    """Why this decision and no other is explained."""
    first: int
    """Number of the run's first decision."""
    last: int
    """Number of its last decision."""
    predicted_step_seconds: float | None
    """What the planner expected of the chosen configuration."""
    seen_step_seconds: float | None
    """Median of the steps that ran in it afterwards, up to the next move; None where there were none."""
    seen_steps: int
    """How many these were."""

    @property
    def decision(self) -> Decision:
        """The decision."""
        return self.event.decision


def explain(run_text: str, number: int | None, *, as_json: bool = False, all_candidates: bool = False) -> int:
    """Print a decision of a run. Raises JobError where there is no such run or decision."""
    run = find_run(run_text)
    explanation = explanation_of(run, number)
    if as_json:
        print(json.dumps(as_values(run, explanation)))
    else:
        _print(run, explanation, all_candidates)
    return 0


def explanation_of(run: Path, number: int | None) -> Explanation:
    """Find a decision: `number`, else the newest that moved the job, else the newest. Raises JobError without one."""
    decisions: dict[int, tuple[int, bytes]] = {}  # place in the history, and the line: only one is parsed
    history: list[bytes] = []
    moving = None
    for line in event_lines(run, "start", "step", "reconfigure", "decision"):
        if line.kind == "start":  # what a restart went back behind is decided again
            decisions = {n: kept for n, kept in decisions.items() if samples_of(kept[1]) <= samples_of(line.text)}
            moving = moving if moving in decisions else None
        if line.kind == "decision":
            if (found := line.decision_number()) is not None:
                decisions[found] = (len(history), line.text)
            continue
        history.append(line.text)
        if line.kind == "reconfigure" and isinstance(event := parse_event(line.text), Reconfigure):
            moving = event.decision
    if not decisions:
        raise JobError(f"{shown(run)}: the planner has decided nothing yet")
    first, last = min(decisions), max(decisions)
    if number is not None and number not in decisions:
        raise JobError(f"--decision {number}: {shown(run)} has decisions {first} to {last}")
    if number is not None:
        chosen, why = number, ""
    elif moving in decisions and moving is not None:
        chosen, why = moving, "the newest that moved the job"
    else:
        chosen, why = last, "the newest; none has moved the job"
    position, text = decisions[chosen]
    made = parse_event(text)
    if not isinstance(made, DecisionMade):
        raise JobError(f"{shown(run)}: decision {chosen} was written by another version of copus")
    steps = _steps_after(made.decision, map(parse_event, history[position:]))
    predicted = next(
        (c.step_seconds for c in made.decision.candidates if c.configuration == made.decision.chosen), None
    )
    seen = statistics.median(steps) if steps else None
    return Explanation(made, why, first, last, predicted, seen, len(steps))


def _steps_after(decision: Decision, later: Iterable[Event | None]) -> list[float]:
    """Durations of the steps that ran in the chosen configuration after the decision, up to the next move."""
    seconds: list[float] = []
    running = not decision.switch
    for event in later:
        if isinstance(event, Reconfigure):
            if event.decision != decision.number:
                break
            running = True
        elif isinstance(event, Start):
            running = event.configuration == decision.chosen
        elif isinstance(event, Step) and running:
            seconds.append(event.seconds)
    return seconds


def as_values(run: Path, explanation: Explanation) -> dict[str, object]:
    """The explanation as plain values, for `--json`."""
    event = explanation.event
    return {
        "run": str(run),
        "decisions": {"first": explanation.first, "last": explanation.last},
        "time": event.time,
        "step": event.step,
        "samples_consumed": event.samples_consumed,
        "seconds": event.seconds,
        "decision": explanation.decision.model_dump(mode="json") | {"switch": explanation.decision.switch},
        "predicted_step_seconds": explanation.predicted_step_seconds,
        "seen_step_seconds": explanation.seen_step_seconds,
        "seen_steps": explanation.seen_steps,
    }


def shown_candidates(decision: Decision, all_candidates: bool) -> list[CandidateScore]:
    """The best ones, and always the chosen and the current one."""
    kept = {decision.chosen, decision.current}
    return [
        candidate
        for place, candidate in enumerate(decision.candidates)
        if all_candidates or place < BEST or candidate.configuration in kept
    ]


def cells(candidate: CandidateScore) -> list[str]:
    """What a table says of a candidate, in the order of `COLUMNS`."""
    spread = None
    if candidate.samples_per_second and candidate.step_seconds and candidate.step_seconds_spread is not None:
        spread = candidate.samples_per_second * candidate.step_seconds_spread / candidate.step_seconds
    return [
        candidate.configuration.layout.label,
        str(candidate.configuration.micro_batch),
        str(candidate.configuration.global_batch),
        _number(candidate.samples_per_second, ".1f"),
        _number(spread, ".1f"),
        candidate.source,
        _number(candidate.efficiency, ".3f"),
        _number(candidate.goodput, ".2f"),
        _number(candidate.gain, "+.1%"),
        "–" if candidate.peak_bytes is None else f"{candidate.peak_bytes / 2**30:.2f} GiB",
        "–" if candidate.move_seconds is None else duration(candidate.move_seconds),
        "–" if candidate.saved_seconds is None else duration(candidate.saved_seconds),
        candidate.verdict,
    ]


def _table(decision: Decision, rows: list[CandidateScore], left_out: Collection[str]) -> "Table":
    from rich.text import Text

    table = new_table()
    told = [dict(zip(COLUMNS, cells(candidate), strict=True)) for candidate in rows]
    names = [name for name in COLUMNS if name not in left_out]
    for name in names:
        if name == "verdict":
            table.add_column(name)
        else:
            add_solid_column(table, name, [row[name] for row in told], right=name not in WORDS)
    for candidate, row in zip(rows, told, strict=True):
        chosen, current = candidate.configuration == decision.chosen, candidate.configuration == decision.current
        style = "bold green" if chosen else "cyan" if current else ""
        table.add_row(*(Text(row[name]) for name in names), style=style)
    return table


def _print(run: Path, explanation: Explanation, all_candidates: bool) -> None:
    from rich.text import Text

    decision = explanation.decision
    rows = shown_candidates(decision, all_candidates)
    console = page()
    table = fitted(lambda left_out: _table(decision, rows, left_out), DISPENSABLE, console.width - VERDICT_WIDTH)
    console.print(Text("\n".join(_heading(run, explanation))), soft_wrap=True)
    console.print(table)
    if len(rows) < len(decision.candidates):
        console.print(
            Text(f"{len(rows)} of {len(decision.candidates)} candidates; --all shows the others", style="dim")
        )


def _heading(run: Path, explanation: Explanation) -> list[str]:
    why = f" ({explanation.why})" if explanation.why else ""
    first = f"{shown(run)}: decision {explanation.decision.number} of {explanation.first}–{explanation.last}{why}"
    return [first, *(f"  {name:<10} {value}" for name, value in facts(run, explanation))]


def facts(run: Path, explanation: Explanation) -> list[tuple[str, str]]:
    """When, on what, by which rule, with what outcome, and what came of it: name and value."""
    decision, event = explanation.decision, explanation.event
    try:
        when = f"{count(event.samples_consumed * load_job(run / 'job.yaml').model.seq_len)} tokens"
    except JobError:  # the run is from another version; what it decided can still be read
        when = f"{event.samples_consumed} sequences"
    noise, factor = decision.noise, decision.critical_batch_factor
    interval = noise_interval(noise.value, noise.low, noise.high)
    interval = f"= {interval} sequences" if noise.value is not None else "is unknown"
    critical = (
        "is unknown" if decision.critical_batch is None else f"= {three_digits(decision.critical_batch)} sequences"
    )
    formula = {"plain": "throughput × efficiency", "lr-aware": "throughput × efficiency × √batch"}[decision.objective]
    outcome = f"stay at {decision.current.label}"
    if decision.advised is not None:
        outcome += f"; advisory: {decision.advised.label} would have been chosen"
    if decision.switch:
        gain = "" if decision.predicted_gain is None else f", predicted goodput {decision.predicted_gain:+.1%}"
        outcome = f"{decision.current.label} → {decision.chosen.label}{gain}"
    rows = [
        ("when", f"step {event.step}, {when}"),
        ("noise", f"B_simple {interval} after {noise.samples} steps"),
        ("critical", f"φ = {factor:g} · B_simple {critical}"),
        *_forecast(decision),
        ("objective", f"{decision.objective}: goodput = {formula}, efficiency = 1 / (1 + batch/φ)"),
        ("policy", f"{decision.policy}, thought for {event.seconds * 1000:.0f} ms"),
        ("outcome", outcome),
        ("reason", decision.reason),
    ]
    predicted, seen = explanation.predicted_step_seconds, explanation.seen_step_seconds
    if seen is None:
        seen_text = "no step has run in it since"
    else:
        seen_text = f"seen {seen * 1000:.0f} ms a step (median of {explanation.seen_steps})"
        if predicted:
            seen_text += f", {seen / predicted - 1:+.1%}"
    predicted_text = "no prediction" if predicted is None else f"predicted {predicted * 1000:.0f} ms"
    return [*rows, ("chosen", f"{predicted_text}, {seen_text}")]


def _forecast(decision: Decision) -> list[tuple[str, str]]:
    """The line about the noise scale to come; none where nothing is known."""
    found = decision.forecast
    if found is None:
        return []
    interval = noise_interval(found.value, found.low, found.high)
    return [("forecast", f"B_simple {interval} at {count(found.tokens)} tokens")]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
