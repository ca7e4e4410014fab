"""`copus explain`: what the planner saw, what it chose and why, and whether it was right about it."""

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from copus.event_lines import read_decision
from copus.events import DecisionMade, DecisionTaken, Event, Reconfigure, Start, Step, read_events
from copus.job import JobError, load_job
from launch.json_output import as_json_line
from launch.run_directory import find_run, shown
from launch.tables import add_solid_column, fitted, new_table, page, print_facts
from profiles.decision import CandidateScore, Decision
from profiles.formatting import (
    count,
    duration,
    duration_interval,
    gibibytes,
    noise_interval,
    percent,
    signed_duration,
    signed_percent,
    three_digits,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BEST = 8
"""Candidates shown, unless all are asked for. The chosen and the current one are always there."""
COLUMNS = ("candidate", "step", "±", "speed", "efficiency", "now", "saves", "move", "memory", "source", "verdict")
WORDS = ("candidate", "source", "verdict")
"""The columns that are not figures."""
DISPENSABLE = ("memory", "source", "move", "step", "±", "efficiency", "speed")
"""Columns that a narrow terminal goes without, the first one first; `--json` has them."""
VERDICTS = {
    "CHOSEN": "CHOSEN",
    "WOULD BE CHOSEN": "ADVISED",
    "current": "current",
    "slower": "slower",
    "lower goodput": "worse",
    "saving uncertain": "unsure",
    "no gain": "equal",
    "no decision yet": "waiting",
    "not measured": "unknown",
}
"""First words of verdicts that one word says all of; the figures are in the row."""


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
    """Median of the steps that ran in it afterwards, up to the next move; None if there were none."""
    seen_steps: int
    """How many these were."""

    @property
    def decision(self) -> Decision:
        """The decision."""
        return self.event.decision


def explain(run_text: str | None, number: int | None, *, as_json: bool = False, all_candidates: bool = False) -> int:
    """Print a decision of a run. Raises JobError if there is no such run or decision."""
    run = find_run(run_text)
    explanation = explanation_of(run, number)
    if as_json:
        print(as_json_line(as_values(run, explanation)))
    else:
        _print(run, explanation, all_candidates)
    return 0


def explanation_of(run: Path, number: int | None, events: Iterable[Event] | None = None) -> Explanation:
    """Find a decision: `number`, else the newest that moved the job, else the newest. Raises JobError without one.
    `events` are those of the run's log, if they were read already."""
    decisions: dict[int, tuple[int, DecisionTaken]] = {}  # with its place in the history
    history: list[Event] = []
    moving = None
    for event in read_events(run) if events is None else events:
        if isinstance(event, DecisionTaken):
            decisions[event.number] = (len(history), event)
        elif isinstance(event, Start):  # what a restart went back behind is decided again
            kept = {n: at for n, at in decisions.items() if at[1].samples_consumed <= event.samples_consumed}
            decisions, moving = kept, moving if moving in kept else None
        elif isinstance(event, Reconfigure):
            moving = event.decision
        if isinstance(event, Start | Step | Reconfigure):
            history.append(event)
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
    position, taken = decisions[chosen]
    made = read_decision(run, taken)
    if made is None:
        raise JobError(
            f"{shown(run)}: decision {chosen} is not in {taken.file}, or was written by another version of copus"
        )
    steps = _steps_after(made.decision, history[position:])
    predicted = next(
        (c.step_seconds for c in made.decision.candidates if c.configuration == made.decision.chosen), None
    )
    seen = statistics.median(steps) if steps else None
    return Explanation(made, why, first, last, predicted, seen, len(steps))


def _steps_after(decision: Decision, later: Iterable[Event]) -> list[float]:
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
    """The best ones, and always the chosen and the current one, in the order of what decides: the expected saving if
    the policy works it out, else goodput. Those that could not be chosen come last."""
    ranked = sorted(decision.candidates, key=lambda score: -_saving(score))
    kept = {decision.chosen, decision.current}
    return [
        candidate
        for place, candidate in enumerate(ranked)
        if all_candidates or place < BEST or candidate.configuration in kept
    ]


def _saving(candidate: CandidateScore) -> float:
    """What a candidate is ranked by, beside others that come in the order of goodput."""
    if candidate.move_seconds is None and candidate.saved_seconds is None:
        return -math.inf if candidate.verdict not in ("CHOSEN", "current") else 0.0
    return candidate.saved_expected_seconds or 0.0


def cells(candidate: CandidateScore, current: CandidateScore | None) -> list[str]:
    """What a table says of a candidate beside the `current` one, in the order of `COLUMNS`; the verdict in one word."""
    ratios = ratios_of(candidate, current)
    spread = None
    if candidate.step_seconds and candidate.step_seconds_spread is not None:
        spread = candidate.step_seconds_spread / candidate.step_seconds
    return [
        candidate.configuration.label,
        "–" if candidate.step_seconds is None else duration(candidate.step_seconds),
        "–" if spread is None else percent(spread),
        *("–" if ratio is None else f"×{ratio:.2f}" for ratio in ratios),
        _saved(candidate),
        "–" if candidate.move_seconds is None else duration(candidate.move_seconds),
        "–" if candidate.peak_bytes is None else gibibytes(candidate.peak_bytes),
        candidate.source,
        verdict_word(candidate.verdict),
    ]


class Ratios(NamedTuple):
    """A candidate over the current configuration, at one φ: goodput is the product of the other two (times √B for the
    lr-aware form). None if one is not known."""

    throughput: float | None
    efficiency: float | None
    goodput: float | None


def ratios_of(candidate: CandidateScore, current: CandidateScore | None) -> Ratios:
    """How much faster, and how much less or more a sequence teaches."""

    def over(mine: float | None, other: float | None) -> float | None:
        return mine / other if mine is not None and other else None

    if current is None:
        return Ratios(None, None, None)
    gain = None if candidate.gain is None else 1 + candidate.gain
    throughput = over(candidate.samples_per_second, current.samples_per_second)
    return Ratios(throughput, over(candidate.efficiency, current.efficiency), gain)


def verdict_word(verdict: str) -> str:
    """One word for a verdict. What it leaves out stands in a note below the table."""
    start = verdict.partition(":")[0]
    if start in VERDICTS:
        return VERDICTS[start]
    for part, word in (
        ("out of memory", "memory"),
        ("fit:", "memory"),
        ("cost of", "cost"),
        ("uncertain", "unsure"),
    ):
        if part in verdict:
            return word
    return "less" if verdict.startswith("gain") else "refused"


def _saved(candidate: CandidateScore) -> str:
    """`14 min (6–21)`; only the pessimistic end where nothing else was recorded."""
    low, expected, high = candidate.saved_low_seconds, candidate.saved_expected_seconds, candidate.saved_high_seconds
    if candidate.verdict == "current":
        return "–"
    if low is None or expected is None or high is None:  # a log of an earlier version
        return "–" if candidate.saved_seconds is None else f"≥ {signed_duration(candidate.saved_seconds)}"
    return duration_interval(expected, low, high)


def trade(decision: Decision) -> str | None:
    """The choice in one line: `throughput ×1.80, efficiency ×0.85 → ×1.53 now; 40 min left →
    saves 14 min (6–21), move 40 s`. None if the job stays, or its goodput is not known."""
    scores = {score.configuration: score for score in decision.candidates}
    target = decision.advised or decision.chosen
    chosen, current = scores.get(target), scores.get(decision.current)
    if chosen is None or current is None or target == decision.current:
        return None
    throughput, efficiency, now = ratios_of(chosen, current)
    if throughput is None or efficiency is None or now is None:
        return None
    line = f"throughput ×{throughput:.2f}, efficiency ×{efficiency:.2f} → ×{now:.2f} now"
    if decision.seconds_left is not None and chosen.saved_expected_seconds is not None:
        line += f"; {duration(decision.seconds_left)} left → saves {_saved(chosen)}"
    return line + (f", move {duration(chosen.move_seconds)}" if chosen.move_seconds else "")


def at_stake(decision: Decision) -> str | None:
    """`at most 3 % of the time left (72 s), as φ may be 84 to 440`: what the noise scale and c leave open. None if the
    policy does not work it out."""
    share, low, high = decision.regret_bound, decision.critical_batch_low, decision.critical_batch_high
    if share is None or low is None or high is None:
        return None
    seconds = "" if decision.seconds_left is None else f" ({duration(share * decision.seconds_left)})"
    open_end = f"as φ may be {three_digits(low)} to {three_digits(high)} sequences"
    return f"at most {percent(share)} of the time left{seconds}, {open_end}"


def notes(rows: Iterable[CandidateScore]) -> dict[str, int]:
    """Verdicts that one word does not say all of, with their numbers below the table."""
    long = [row.verdict for row in rows if row.verdict.partition(":")[0] not in VERDICTS]
    return {verdict: number for number, verdict in enumerate(dict.fromkeys(long), start=1)}


def _table(decision: Decision, rows: list[CandidateScore], left_out: Collection[str]) -> "Table":
    from rich.text import Text

    table = new_table()
    table.padding = (0, 1, 0, 0)  # narrower than others: eighty columns have to hold what decides
    current = next((score for score in decision.candidates if score.configuration == decision.current), None)
    numbers = notes(rows)
    told = [dict(zip(COLUMNS, cells(candidate, current), strict=True)) for candidate in rows]
    for candidate, row in zip(rows, told, strict=True):
        if candidate.verdict in numbers:
            row["verdict"] += f" [{numbers[candidate.verdict]}]"
    names = [name for name in COLUMNS if name not in left_out]
    for name in names:
        add_solid_column(table, name, [row[name] for row in told], right=name not in WORDS)
    for candidate, row in zip(rows, told, strict=True):
        chosen, is_current = candidate.configuration == decision.chosen, candidate.configuration == decision.current
        style = "bold green" if chosen else "cyan" if is_current else ""
        table.add_row(*(Text(row[name]) for name in names), style=style)
    return table


def _print(run: Path, explanation: Explanation, all_candidates: bool) -> None:
    console = page()
    print_facts(_heading(run, explanation), facts(run, explanation), console)
    print_candidates(explanation.decision, shown_candidates(explanation.decision, all_candidates), console)


def print_candidates(decision: Decision, rows: list[CandidateScore], console: "Console") -> None:
    """Print the table of a decision's candidates, with the notes below it."""
    from rich.text import Text

    console.print(fitted(lambda left_out: _table(decision, rows, left_out), DISPENSABLE, console.width))
    for verdict, number in notes(rows).items():
        print_facts(f"[{number}] {verdict}", [], console)
    total, more = len(decision.candidates) + decision.omitted, len(decision.candidates) - len(rows)
    if len(rows) < total:
        rest = f"; --all shows {more} more" if more else ""
        console.print(Text(f"{len(rows)} of {total} candidates{rest}", style="dim"))


def _heading(run: Path, explanation: Explanation) -> str:
    why = f" ({explanation.why})" if explanation.why else ""
    return f"{shown(run)}: decision {explanation.decision.number} of {explanation.first}–{explanation.last}{why}"


def facts(run: Path, explanation: Explanation) -> list[tuple[str, str]]:
    """When, on what, by which rule, with what outcome, and what came of it: name and value."""
    decision, event = explanation.decision, explanation.event
    try:
        when = f"{count(event.samples_consumed * load_job(run / 'job.yaml').model.seq_len)} tokens"
    except JobError:  # the run is from another version; what it decided can still be read
        when = f"{event.samples_consumed} sequences"
    noise = decision.noise
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
        verb = "tries" if decision.trial else "moves"
        outcome = f"{verb} {decision.current.label} → {decision.chosen.label}"
    rows = [
        ("when", f"step {event.step}, {when}"),
        ("noise", f"B_simple {interval} after {noise.samples} steps"),
        ("critical", f"φ {critical}{_factors(decision)}"),
        *_forecast(decision),
        ("objective", f"{decision.objective}: goodput = {formula}, efficiency = 1 / (1 + batch/φ)"),
        ("policy", f"{decision.policy}, decided in {duration(event.seconds)}"),
        ("outcome", outcome),
        *([("trade", line)] if (line := trade(decision)) else []),
        *([("at stake", line)] if (line := at_stake(decision)) else []),
        ("reason", decision.reason),
    ]
    predicted, seen = explanation.predicted_step_seconds, explanation.seen_step_seconds
    if seen is None:
        seen_text = "no step has run in it since"
    else:
        seen_text = f"measured {duration(seen)} per step (median of {explanation.seen_steps})"
        if predicted:
            seen_text += f", {signed_percent(seen / predicted - 1)}"
    predicted_text = "no prediction" if predicted is None else f"predicted {duration(predicted)}"
    return [*rows, ("chosen", f"{predicted_text}, {seen_text}")]


def _factors(decision: Decision) -> str:
    """`: 2 · B_simple, 1.49 × larger by now than when it was measured`: how φ follows from the noise scale."""
    value, factor = decision.noise.value, decision.critical_batch_factor
    if value is None:
        return "" if decision.critical_batch is None else ", by published laws: no noise scale has been measured yet"
    if decision.critical_batch is None:
        return ""
    grown = decision.critical_batch / (factor * value)
    since = f", {grown:.2f} × larger by now than when it was measured" if abs(grown - 1) >= 0.005 else ""
    return f": {factor:.3g} · B_simple{since}"


def _forecast(decision: Decision) -> list[tuple[str, str]]:
    """The line about the noise scale to come; none if nothing is known."""
    forecast = decision.forecast
    if forecast is None:
        return []
    interval = noise_interval(forecast.value, forecast.low, forecast.high)
    return [("forecast", f"B_simple {interval} at {count(forecast.tokens)} tokens")]
