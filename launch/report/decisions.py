"""Every decision as a heat map: goodput by batch and layout, which the page steps through with a slider."""

from typing import Any

from launch.explain import trade, verdict_word
from launch.history import History
from launch.report.series import thinned
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision
from profiles.formatting import count, duration, noise_interval, percent, three_digits

MOST_DECISIONS = 240
"""Decisions that the page has; of more, those that moved the job come first, then others evenly."""
MOST_LAYOUTS = 12
"""Layouts that the heat map has rows for: those that ran, then the best."""


def decision_maps(history: History, shades: dict[str, str]) -> dict[str, Any] | None:
    """What the slider of the page steps through, as plain values; None without a decision that can be read.

    `cells` of a decision has a row for each layout, and in it for each batch `[goodput over that of the current
    configuration, micro-batch, verdict]`, or null.
    """
    numbers = kept_numbers(history)
    decisions = [(number, made) for number in numbers if (made := history.decision(number)) is not None]
    if not decisions:
        return None
    scored = [score for _, made in decisions for score in made.candidates if _value(score) is not None]
    best: dict[str, float] = {}
    for score in scored:
        name = score.configuration.layout.label
        best[name] = max(best.get(name, 0.0), _value(score) or 0.0)
    ran = history.layouts()
    others = sorted((name for name in best if name not in ran), key=lambda name: -best[name])
    layouts = [*ran, *others][:MOST_LAYOUTS]
    batches = sorted({score.configuration.global_batch for score in scored})
    moved = [place for place, (_, made) in enumerate(decisions) if made.switch]
    return {
        "layouts": [[name, shades.get(name, "var(--muted)")] for name in layouts],
        "batches": batches,
        "first": moved[-1] if moved else len(decisions) - 1,
        "decisions": [_shown(history, number, made, layouts, batches) for number, made in decisions],
    }


def kept_numbers(history: History) -> list[int]:
    """Numbers of the decisions that the page has, in order."""
    taken = history.decisions
    moving = [number for number in sorted(taken) if taken[number].switch][-MOST_DECISIONS:]
    staying = [number for number in sorted(taken) if not taken[number].switch]
    room = MOST_DECISIONS - len(moving)
    return sorted([*moving, *(thinned(staying, room) if room > 1 else [])])


def _value(score: CandidateScore) -> float | None:
    """Goodput; while the noise is unknown, throughput."""
    return score.samples_per_second if score.goodput is None else score.goodput


def _shown(history: History, number: int, made: Decision, layouts: list[str], batches: list[int]) -> dict[str, Any]:
    taken = history.decisions[number]
    best: dict[tuple[int, int], CandidateScore] = {}
    for score in made.candidates:
        value, place = _value(score), _place(score.configuration, layouts, batches)
        if value is None or place is None:
            continue
        # The cell of a configuration that runs, or will, is that configuration's, though another be better.
        special = score.configuration in (made.current, made.chosen)
        before = best.get(place)
        if (
            before is None
            or special
            or (before.configuration not in (made.current, made.chosen) and value > (_value(before) or 0.0))
        ):
            best[place] = score
    current = next((_value(score) for score in made.candidates if score.configuration == made.current), None)
    reference = current or max(((_value(score) or 0.0) for score in best.values()), default=0.0) or 1.0
    cells: list[list[list[Any] | None]] = [[None] * len(batches) for _ in layouts]
    for (row, column), score in best.items():
        ratio = round((_value(score) or 0.0) / reference, 3)
        cells[row][column] = [ratio, score.configuration.micro_batch, verdict_word(score.verdict)]
    verb = "tries" if made.trial else "moves to"
    outcome = f"{verb} {made.chosen.label}" if made.switch else f"stays in {made.current.label}"
    if made.advised is not None:
        outcome += f"; advises {made.advised.label}"
    return {
        "number": number,
        "moved": made.switch,
        "when": f"{count(taken.samples_consumed * history.seq_len)} tokens",
        "noise": noise_interval(made.noise.value, made.noise.low, made.noise.high),
        "critical": "unknown" if made.critical_batch is None else three_digits(made.critical_batch),
        "outcome": outcome,
        "trade": trade(made) or "",
        "reason": made.reason,
        "current": _place(made.current, layouts, batches),
        "chosen": _place(made.chosen, layouts, batches),
        "cells": cells,
    }


def _place(configuration: Configuration, layouts: list[str], batches: list[int]) -> tuple[int, int] | None:
    name, batch = configuration.layout.label, configuration.global_batch
    return (layouts.index(name), batches.index(batch)) if name in layouts and batch in batches else None


def at_a_glance(history: History) -> str:
    """How many decisions there were, and what they led to."""
    decisions = history.decisions.values()
    seconds = sum(taken.seconds for taken in decisions)
    moving = sum(taken.switch for taken in decisions)
    share = f" ({percent(seconds / history.end)} of the time)" if history.end > 0 else ""
    return f"{len(history.decisions)} decisions took {duration(seconds)}{share}; {moving} moved the job or tried"
