"""What the plots of a report show, as numbers: pure functions of a run's history."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, TypeVar

from launch.history import History, LossAt, MoveAt, StepAt
from launch.lines import Lines, fastest, point
from launch.plot import smoothed
from planner.efficiency import statistical_efficiency
from planner.goodput import Objective, goodput
from profiles.configuration import Configuration
from profiles.decision import Decision

MOST_POINTS = 1500
"""Points that a curve keeps: as many as a screen can show."""
SMOOTHING = 0.01
"""Half-life of the smoothed loss, as a share of the tokens trained on."""

Row = TypeVar("Row")


def thinned(rows: Sequence[Row], most: int = MOST_POINTS) -> list[Row]:
    """At most so many rows, evenly spaced, with the first and the last one."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def thinned_peaks(rows: Sequence[Row], value: Callable[[Row], float], most: int = MOST_POINTS) -> list[Row]:
    """At most so many rows that keep every peak: the lowest and the highest of equal shares of the rows, in order, with
    the first and the last one."""
    if len(rows) <= most:
        return list(rows)
    shares = (most - 2) // 2
    kept = {0, len(rows) - 1}
    for share in range(shares):
        places = range(share * len(rows) // shares, (share + 1) * len(rows) // shares)
        kept |= {min(places, key=lambda place: value(rows[place])), max(places, key=lambda place: value(rows[place]))}
    return [rows[place] for place in sorted(kept)]


def smoothed_loss(steps: Sequence[StepAt]) -> list[LossAt]:
    """Exponential mean of the training loss, each sequence counted alike, with a half-life in tokens: a change of batch
    does not change what it looks back on."""
    half_life = max(1.0, SMOOTHING * (steps[-1].tokens - steps[0].tokens)) if steps else 1.0
    total = weight = before = 0.0
    rows = []
    for step in steps:
        if step.loss is None:
            continue
        kept = 0.5 ** ((step.tokens - before) / half_life)
        total, weight, before = kept * total + step.batch * step.loss, kept * weight + step.batch, step.tokens
        rows.append(LossAt(step.tokens, step.seconds, total / weight))
    return rows


class GoodputAt(NamedTuple):
    """Goodput and what it is the product of, at a step."""

    tokens: float
    seconds: float
    throughput: float
    """Sequences a second, running median of the steps of this configuration."""
    efficiency: float | None
    """1 / (1 + B/φ), with the noise scale of that moment; None while it was unknown."""
    goodput: float | None
    """Useful sequences a second (times √B for an lr-aware job)."""
    unmoved: float | None
    """The same for the configuration that the run began in: its median throughput, at the noise of this moment. What
    that would have come to is for the audit to say: the machine was not the same at all times."""


def decomposition(history: History, factor: float, objective: Objective) -> list[GoodputAt]:
    """Throughput × statistical efficiency over the run, with φ = factor · B_simple."""
    steps = history.steps
    rates = smoothed([(step.tokens, step.batch / step.duration, step.span) for step in steps])
    first = first_throughput(history)
    noise, place, rows = None, 0, list[GoodputAt]()
    for step, rate in zip(steps, rates, strict=True):
        while place < len(history.noise) and history.noise[place].tokens <= step.tokens:
            noise = history.noise[place].value
            place += 1
        efficiency = score = unmoved = None
        if noise is not None:
            efficiency = statistical_efficiency(step.batch, factor * noise)
            score = goodput(rate, step.batch, factor * noise, objective)
            if first is not None:
                unmoved = goodput(first, steps[0].batch, factor * noise, objective)
        rows.append(GoodputAt(step.tokens, step.seconds, rate, efficiency, score, unmoved))
    return rows


def first_throughput(history: History) -> float | None:
    """Sequences a second of the configuration that the run began in: the median of its steps, else what the profiler of
    this run measured. None without either."""
    if not history.spans:
        return None
    first = history.spans[0].configuration
    rates = [step.batch / step.duration for step in history.steps if step.span == 0]
    if rates:
        return median(rates)
    rates = [
        first.global_batch / row.step_seconds
        for row in history.measured
        if row.step_seconds and row.configuration == first
    ]
    return rates[-1] if rates else None


@dataclass(frozen=True)
class Share:
    """A kind of time."""

    kind: str
    seconds: float
    share: float
    """Of all the time, 0 to 1."""


KIND_WORDS = {
    "training": "training steps that count",
    "repeated": "steps that were done again after a restart",
    "measuring": "measuring throughput before training",
    "starting": "starting up before training",
    "evaluating": "evaluating held-out loss",
    "moving": "moving to another configuration",
    "checkpoints": "writing checkpoints",
    "planning": "the planner deciding",
    "down": "down: from the last sign of life to the workers' return",
    "other": "everything else: fetching data, writing events, waiting",
}
"""Kinds of time, in the order in which they are shown. The first is the productive one."""


def time_shares(history: History) -> list[Share]:
    """Where the time went, from the first event to the last; it sums up to 1. Empty without events that took time."""
    total = history.end - history.begin
    if total <= 0:
        return []
    seconds = dict.fromkeys(KIND_WORDS, 0.0)
    seconds["training"] = sum(step.duration for step in history.steps)
    seconds["repeated"] = history.repeated_seconds
    for pause in history.pauses:
        seconds[pause.kind] += pause.end - pause.begin
    seconds["other"] = max(0.0, total - sum(seconds.values()))
    whole = max(total, sum(seconds.values()))  # clocks of two machines may differ by a little
    return [Share(kind, spent, spent / whole) for kind, spent in seconds.items() if spent > 0]


def predicted_lines(decision: Decision) -> Lines:
    """What the planner expected of each layout."""
    return fastest(
        point(candidate.configuration, candidate.step_seconds, candidate.step_seconds_spread, candidate.source)
        for candidate in decision.candidates
        if candidate.step_seconds
    )


def profiled_lines(history: History) -> Lines:
    """What this run measured before training: for where the planner has decided nothing yet."""
    return fastest(
        point(measurement.configuration, measurement.step_seconds, None, "measured")
        for measurement in history.measured
        if measurement.step_seconds
    )


class SeenPoint(NamedTuple):
    """What the steps of the run were like in a configuration."""

    layout: str
    batch: int
    micro_batch: int
    rate: float
    """Median, sequences a second."""
    steps: int


def seen_points(history: History) -> list[SeenPoint]:
    """One for each configuration that ran, in the order in which the run came to them."""
    rates: dict[tuple[str, int, int], list[float]] = {}
    for step in history.steps:
        if 0 <= step.span < len(history.spans):
            configuration = history.spans[step.span].configuration
            key = (configuration.layout.label, configuration.global_batch, configuration.micro_batch)
            rates.setdefault(key, []).append(step.batch / step.duration)
    return [SeenPoint(*key, median(times), len(times)) for key, times in rates.items()]


def memory_of_spans(history: History) -> list[tuple[tuple[float, float], tuple[float, float], int]]:
    """From and to (tokens, seconds) of each stretch in one configuration, and the peak bytes of a rank that the planner
    had predicted of it, if it had."""
    peaks: dict[Configuration, int] = {}
    for number in sorted(history.decisions):
        if history.decisions[number].switch or number == max(history.decisions):
            made = history.decision(number)
            for score in made.candidates if made else []:
                if score.peak_bytes is not None:
                    peaks[score.configuration] = score.peak_bytes
    return [
        ((span.first_tokens, span.first_seconds), (span.last_tokens, span.last_seconds), peaks[span.configuration])
        for span in history.spans
        if span.configuration in peaks
    ]


class MoveOutcome(NamedTuple):
    """A move, what was expected of it, and what was seen."""

    move: MoveAt
    reason: str
    """Why the planner wanted it; empty if its decision is not there."""
    predicted_seconds: float | None
    """Step time that was expected."""
    seen_seconds: float | None
    """Median step time until the next move."""
    steps: int


def move_outcomes(history: History) -> list[MoveOutcome]:
    """One for each move."""
    durations: dict[int, list[float]] = {}
    for step in history.steps:
        durations.setdefault(step.span, []).append(step.duration)
    outcomes = []
    for move in history.moves:
        made = history.decision(move.event.decision)
        scores = made.candidates if made else []
        score = next((candidate for candidate in scores if candidate.configuration == move.event.after), None)
        seen = durations.get(move.span, [])
        outcomes.append(
            MoveOutcome(
                move,
                made.reason if made else "",
                score.step_seconds if score else None,
                median(seen) if seen else None,
                len(seen),
            )
        )
    return outcomes


def reached(evaluations: Sequence[LossAt], target: float) -> LossAt | None:
    """Where the held-out loss first came down to `target`, on the straight line between two evaluations."""
    before = None
    for evaluation in evaluations:
        if evaluation.loss <= target:
            if before is None or before.loss == evaluation.loss:
                return evaluation
            part = (before.loss - target) / (before.loss - evaluation.loss)
            return LossAt(
                before.tokens + part * (evaluation.tokens - before.tokens),
                before.seconds + part * (evaluation.seconds - before.seconds),
                target,
            )
        before = evaluation
    return None
