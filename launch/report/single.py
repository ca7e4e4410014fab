"""What the page of one run says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from copus.audit import Outcome, audit_events
from copus.events import Event, read_events
from copus.job import JobError
from copus.secret_names import is_secret
from launch.audit import audit_facts
from launch.explain import BEST, COLUMNS, WORDS, Explanation, cells, explanation_of, shown_candidates
from launch.explain import facts as decision_facts
from launch.history import History
from launch.report import figures, style
from launch.report.decisions import at_a_glance, decision_maps
from launch.report.overview import overview
from launch.report.render import Column, Content, Row, Table
from launch.report.series import (
    KIND_WORDS,
    GoodputAt,
    decomposition,
    first_throughput,
    move_outcomes,
    predicted_lines,
    profiled_lines,
    seen_points,
    time_shares,
)
from launch.run_state import RunState, state_of
from launch.wording import describe_ratio
from planner.config import PlannerConfig
from planner.goodput import Objective
from profiles.audit import Audit, Estimate
from profiles.formatting import count, duration, noise_interval, percent, signed_percent, three_digits

MOST_ROWS = 60
"""Moves, and notices, that have a row."""
SHARE_COLOURS = {
    **{
        "training": "var(--ink)",
        "measuring": "var(--accent)",
        "starting": "var(--accent)",
        "evaluating": "var(--noise)",
    },
    **{"repeated": "var(--bad)", "down": "var(--bad)"},
}
"""Of kinds of time; the others are faint. None is a layout's."""


def single(history: History, events: Sequence[Event] | None = None) -> Content:
    """The page of a run; `events` are those of its log, if they were read already."""
    state = state_of(history.run, history.status)
    events = list(read_events(history.run)) if events is None else events
    explanation = _last_decision(history, events)
    factor, objective = rules(history, explanation)
    rows = decomposition(history, factor, objective)
    audit, outcomes = audit_events(history.run, events)
    gain = audit.gain_over_first_pct
    lines = predicted_lines(explanation.decision) if explanation else {}
    lines_from = ", as the planner predicted it in its last decision" if lines else ""
    lines = lines or profiled_lines(history)
    shades = style.colours(list(dict.fromkeys([*history.layouts(), *lines])))
    shares = time_shares(history)
    content = Content(history.run.name, summary(history, state, audit))
    content.values = {
        "state": state,
        "tiles": _tiles(history, gain),
        "shades": {name: shades[name] for name in history.layouts()},
        "factor": factor,
        "objective": objective,
        "audit": audit_facts(audit) if history.steps else [],
        "unmoved_words": _unmoved_words(history),
        "moves": _moves(history, shades),
        "moves_words": _moves_words(history),
        "trials": _trials(history, shades),
        "trials_left_out": max(0, len(history.trials) - MOST_ROWS),
        "moves_left_out": max(0, len(history.moves) - MOST_ROWS),
        "shares": _shares(history),
        "productive": percent(shares[0].share) if shares and shares[0].kind == "training" else "none",
        "lines_from": lines_from,
        "predictions": _predictions(outcomes),
        "decisions_words": at_a_glance(history),
        "decision": _candidates(explanation, shades) if explanation else None,
        "decision_facts": decision_facts(history.run, explanation) if explanation else [],
        "decision_left_out": max(0, len(explanation.decision.candidates) - BEST) if explanation else 0,
        "notices": _notices(history),
        "notices_left_out": max(0, len(history.notices) - MOST_ROWS),
        "environment": environment(history),
        "job_text": job_text(history.run),
    }
    content.data = {"decisions": decision_maps(history, shades)} if explanation else {}
    _draw(content, history, rows, shades, objective)
    if lines:
        content.figures["lines"] = figures.lines(lines, seen_points(history), shades, history.seq_len)
    if outcomes:
        content.figures["predictions"] = figures.predictions(outcomes, shades)
    return content


def _draw(
    content: Content, history: History, rows: Sequence[GoodputAt], shades: dict[str, str], objective: Objective
) -> None:
    """Every figure that there is something to draw for, and a reason for every other."""
    time = style.time_axis(history.end)
    nothing = "No step has been trained yet, so there is nothing to draw."
    content.reasons |= dict.fromkeys(("overview-time", "overview-tokens", "steps", "shares"), nothing)
    content.reasons["decision"] = "The planner has decided nothing yet."
    content.reasons["lines"] = "Nothing was measured in this run, and the planner has decided nothing yet."
    content.reasons["predictions"] = "No prediction could be checked yet: the job has not moved."
    if not history.steps:
        return
    content.figures |= {
        "overview-time": overview(history, rows, time, shades, objective),
        "overview-tokens": overview(history, rows, style.TOKENS, shades, objective),
        "speed": figures.speed(history, rows, time, shades),
        "efficiency": figures.efficiency(rows, time),
        "lr": figures.of_steps(history, time, "learning rate", lambda step: step.lr),
        "grad-norm": figures.of_steps(history, time, "gradient norm", lambda step: step.grad_norm, logarithmic=True),
    }
    if any(step.beta2 is not None for step in history.steps):
        content.figures["beta2"] = figures.of_steps(history, time, "β2", lambda step: step.beta2)
    if any(step.expert_imbalance is not None for step in history.steps):
        content.figures["expert-load"] = figures.of_steps(
            history, time, "busiest expert over the mean", lambda step: step.expert_imbalance
        )
    if any(step.dropped_share for step in history.steps):
        content.figures["dropped"] = figures.of_steps(
            history, time, "share of tokens dropped", lambda step: step.dropped_share
        )
    if (memory := figures.memory(history, time)) is not None:
        content.figures["memory"] = memory


def summary(history: History, state: RunState, audit: Audit) -> list[str]:
    """The result in a few sentences."""
    status = history.status
    if status.start is None or not history.steps:
        return ["Nothing has been trained yet."]
    total = status.start.total_samples * history.seq_len
    amount = f"{count(history.tokens)} tokens"
    if history.tokens < total:
        amount += f" of {count(total)} ({percent(status.fraction)})"
    sentences = [f"Trained on {amount} in {duration(history.end)}, on {status.start.hardware}.{_losses(history)}"]
    first, last = history.spans[0].configuration.label, history.spans[-1].configuration.label
    if history.moves:
        seconds = sum(move.event.seconds for move in history.moves)
        times = "once" if len(history.moves) == 1 else f"{len(history.moves)} times"
        sentences.append(f"The job moved {times}, from {first} to {last}, in {duration(seconds)} altogether.")
    else:
        sentences.append(f"It ran in {first} throughout.")
    gain = audit.gain_over_first_pct
    if gain is not None and history.moves:
        words = "more" if gain.value >= 0 else "less"
        sentences.append(
            f"By its own data its first configuration would have taken {abs(gain.value):.0f} % {words} time to the "
            f"same progress ({signed_percent(gain.low / 100)} to {signed_percent(gain.high / 100)})."
        )
    if state.alive:
        sentences.append("The run is still going on; this is how far it was when the page was written.")
    return sentences


def _losses(history: History) -> str:
    evaluations = history.evaluations
    if len(evaluations) > 1:
        return f" Validation loss went from {evaluations[0].loss:.3f} to {evaluations[-1].loss:.3f} nats per token."
    if evaluations:
        return f" Validation loss, evaluated once, was {evaluations[0].loss:.3f} nats per token."
    return ""


def _unmoved_words(history: History) -> str:
    rate = first_throughput(history)
    if rate is None or not history.moves:
        return ""
    first = history.spans[0].configuration.label
    rate *= history.seq_len
    return f"The dashed line is {first} at the noise of each moment and its own median of {count(rate)} tokens/s."


def _tiles(history: History, gain: Estimate | None) -> list[dict[str, str]]:
    status, evaluations = history.status, history.evaluations
    tiles = [("tokens", count(history.tokens), f"{len(history.steps)} steps")]
    measured = -history.begin
    tiles.append(
        ("time", duration(max(0.0, history.end)), f"after {duration(measured)} before training" * (measured > 0))
    )
    if evaluations:
        note = f"at first {evaluations[0].loss:.3f}" if len(evaluations) > 1 else "evaluated once"
        tiles.append(("validation loss", f"{evaluations[-1].loss:.3f}", note))
    elif status.step:
        tiles.append(("training loss", "–" if status.step.loss is None else f"{status.step.loss:.3f}", "last step"))
    if history.noise:
        last = history.noise[-1]
        interval = noise_interval(last.value, last.low, last.high).partition(" ")[2].strip("[]")
        tiles.append(("noise scale", three_digits(last.value), f"{interval} sequences"))
    if status.configuration:
        tiles.append(("batch", str(status.configuration.global_batch), status.configuration.layout.label))
    if status.samples_per_second is not None:
        note = "of the last steps" if status.mfu is None else f"MFU {percent(status.mfu)}"
        tiles.append(("tokens/s", count(status.samples_per_second * history.seq_len), note))
    moves = len(history.moves)
    seconds = sum(move.event.seconds for move in history.moves)
    tiles.append(("moves", str(moves), f"took {duration(seconds)}" if moves else ""))
    if status.start:
        ranks = status.start.configuration.layout.accelerators
        hours = ranks * max(0.0, history.end - history.begin) / 3600
        tiles.append(("device-hours", three_digits(hours), f"{ranks} ranks, measuring included"))
    if history.trials:
        seconds = sum(trial.event.seconds for trial in history.trials)
        tiles.append(("trials", str(len(history.trials)), f"took {duration(seconds)}"))
    if gain is not None and history.moves:
        tiles.append(
            (
                "vs first",
                signed_percent(gain.value / 100),
                f"{signed_percent(gain.low / 100)} to {signed_percent(gain.high / 100)}",
            )
        )
    if history.status.skipped_steps:
        tiles.append(("skipped", str(history.status.skipped_steps), "steps that were not finite"))
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


def _moves(history: History, shades: dict[str, str]) -> Table | None:
    names = ("at", "tokens", "took", "sent", "step predicted", "step seen", "off by")
    columns = [Column("to", "name"), Column("from", "name"), *map(Column, names), Column("why", "words")]
    rows = []
    for outcome in move_outcomes(history)[-MOST_ROWS:]:
        move, event = outcome.move, outcome.move.event
        predicted, seen = outcome.predicted_seconds, outcome.seen_seconds
        texts = [
            event.after.label,
            event.before.label,
            duration(move.seconds),
            count(move.tokens),
            duration(event.seconds),
            f"{event.bytes_moved / 1e6:.0f} MB" if event.bytes_moved else "–",
            "–" if predicted is None else duration(predicted),
            "–" if seen is None else duration(seen),
            signed_percent(seen / predicted - 1) if predicted and seen else "–",
            outcome.reason,
        ]
        rows.append(Row(texts, shades.get(event.after.layout.label, "")))
    return Table(columns, rows) if rows else None


def _moves_words(history: History) -> str:
    """Moves and trials in a line."""
    parts = []
    for number, name, times in (
        (len(history.moves), "move", [move.event.seconds for move in history.moves]),
        (len(history.trials), "trial", [trial.event.seconds for trial in history.trials]),
    ):
        if number:
            parts.append(f"{number} {name}{'s' * (number != 1)} in {duration(sum(times))}")
    return ", ".join(parts)


def _predictions(outcomes: Sequence[Outcome]) -> str:
    """How many predictions held, in a sentence."""
    if not outcomes:
        return ""
    held = sum(outcome.held for outcome in outcomes)
    share = percent(held / len(outcomes))
    return f"{held} of {len(outcomes)} step times lie in the 80 % interval of their prediction ({share})."


def _trials(history: History, shades: dict[str, str]) -> Table | None:
    columns = [Column("tried", "name"), Column("beside", "name"), *map(Column, ("at", "tokens", "took", "steps"))]
    columns += [Column("step time", "words"), Column("outcome", "words")]
    rows = []
    for trial in history.trials[-MOST_ROWS:]:
        event = trial.event
        texts = [
            event.candidate.label,
            event.running.label,
            duration(trial.seconds),
            count(trial.tokens),
            duration(event.seconds),
            str(event.steps),
            describe_ratio(event),
            event.outcome,
        ]
        rows.append(Row(texts, shades.get(event.candidate.layout.label, "")))
    return Table(columns, rows) if rows else None


def _shares(history: History) -> Table | None:
    rows = []
    for share in time_shares(history):
        colour = SHARE_COLOURS.get(share.kind, "var(--faint)")
        texts = [KIND_WORDS[share.kind], duration(share.seconds), percent(share.share)]
        rows.append(Row(texts, colour, width=round(100 * share.share, 3)))
    return Table([Column("time", "words"), Column(""), Column("share")], rows) if rows else None


def _candidates(explanation: Explanation, shades: dict[str, str]) -> Table:
    decision = explanation.decision
    columns = [
        Column(name, "words" if name == "verdict" else "name" if name in WORDS else "number") for name in COLUMNS
    ]
    rows = []
    current = next((score for score in decision.candidates if score.configuration == decision.current), None)
    for score in shown_candidates(decision, all_candidates=False):
        mark = "chosen" if score.configuration == decision.chosen else ""
        mark = mark or ("current" if score.configuration == decision.current else "")
        texts = [*cells(score, current)[:-1], score.verdict]
        rows.append(Row(texts, shades.get(score.configuration.layout.label, ""), mark))
    return Table(columns, rows)


def _notices(history: History) -> Table | None:
    columns = [Column("at"), Column("tokens"), Column("what", "words")]
    rows = [
        Row([duration(notice.seconds), count(notice.tokens) if notice.tokens else "–", notice.text])
        for notice in sorted(history.notices, key=lambda notice: notice.seconds)[-MOST_ROWS:]
    ]
    return Table(columns, rows) if rows else None


def environment(history: History) -> list[tuple[str, str]]:
    """What the run ran on and with. Only what is named here: nothing of any process's environment."""
    start = history.status.start
    rows = [("run directory", str(history.run))]
    if start:
        rows.append(("backend", start.backend or "not recorded"))
        rows += [("hardware", start.hardware), ("software", start.software)]
        rows.append(("ranks", str(start.configuration.layout.accelerators)))
        rows.append(("sequence", f"{start.seq_len} tokens"))
        rows.append(("data", start.data or "not recorded"))
    values = job_values(history.run)
    for section, name in (("model", "layers"), ("model", "hidden"), ("training", "precision"), ("training", "seed")):
        inner = values.get(section)
        if isinstance(inner, dict) and name in inner:
            rows.append((f"{section}.{name}", str(inner[name])))
    policy = values.get("planner")
    if isinstance(policy, dict) and "policy" in policy:
        rows.append(("policy", str(policy["policy"])))
    return rows


def rules(history: History, explanation: Explanation | None) -> tuple[float, Objective]:
    """c and the objective that the planner scores with: of its last decision, else of the job file."""
    if explanation is not None:
        return explanation.decision.critical_batch_factor, explanation.decision.objective
    try:
        planner = PlannerConfig.model_validate(job_values(history.run).get("planner") or {})
    except ValueError:  # of another version
        planner = PlannerConfig()
    return planner.critical_batch_factor, planner.objective


def job_values(run: Path) -> dict[str, Any]:
    """The job file as plain values, whatever version wrote it; texts of secret settings are left out."""
    try:
        values = yaml.safe_load((run / "job.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return _without_secrets(values) if isinstance(values, dict) else {}


def job_text(run: Path) -> str:
    """The same as YAML."""
    return yaml.safe_dump(job_values(run), sort_keys=False, allow_unicode=True)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "(left out)" if isinstance(inner, str) and is_secret(str(name)) else _without_secrets(inner)
            for name, inner in value.items()
        }
    return [_without_secrets(inner) for inner in value] if isinstance(value, list) else value


def _last_decision(history: History, events: Sequence[Event]) -> Explanation | None:
    try:
        return explanation_of(history.run, max(history.decisions), events) if history.decisions else None
    except JobError:  # of another version
        return None
