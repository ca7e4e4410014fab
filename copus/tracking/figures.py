"""What an event says as named numbers: the one place, so that every tracker shows the same."""

import math
from collections import defaultdict
from pathlib import Path

from copus.events import (
    Checkpoint,
    DecisionMade,
    End,
    Evaluate,
    Event,
    Failure,
    Noise,
    Reconfigure,
    Restart,
    Start,
    Step,
    Trial,
    parse_event,
)
from copus.tracking.productive_time import ProductiveTime
from profiles.configuration import Configuration

FIGURES: dict[str, str] = {
    "loss/train": "Mean training loss of the last step, nats per token.",
    "loss/validation": "Held-out loss, nats per token.",
    "optimizer/lr": "Learning rate.",
    "optimizer/beta2": "Adam's β2.",
    "optimizer/grad_norm": "Norm of the gradient before clipping.",
    "experts/imbalance": "Tokens of the busiest expert over the mean of its layer, in the layer where that is largest.",
    "experts/dropped_share": "Share of pairs of a token and one of its experts that the capacity factor cut off.",
    "batch/global_batch": "Global batch, sequences.",
    "batch/micro_batch": "Micro-batch, sequences.",
    "layout/tp": "Tensor parallel degree.",
    "layout/pp": "Pipeline parallel degree.",
    "layout/dp": "Data parallel degree.",
    "layout/cp": "Context parallel degree.",
    "layout/ep": "Expert parallel degree.",
    "layout/etp": "Tensor parallel degree of the experts.",
    "speed/step_seconds": "Duration of the last step.",
    "speed/samples_per_second": "Throughput of the last step, sequences a second.",
    "speed/mfu": "Model FLOP utilization of the last step: operations that the model asks for, over the rated peak.",
    "noise/scale": "Gradient noise scale B_simple, sequences.",
    "noise/low": "Lower end of its 90 % interval, sequences.",
    "noise/high": "Upper end of its 90 % interval, sequences.",
    "noise/critical_batch": "Critical batch φ at the last decision, sequences.",
    "goodput/chosen": "Predicted Goodput of what runs from the last decision on, useful sequences a second.",
    "goodput/current": "Predicted Goodput of what ran before the last decision.",
    "goodput/gain": "Goodput of the chosen configuration over that of the one before, minus 1.",
    "goodput/efficiency": "Statistical efficiency 1 / (1 + B/φ) of the chosen batch.",
    "moves/total": "Moves to another batch or layout so far, those of trials included.",
    "moves/seconds_total": "Time without training because of moves so far, seconds.",
    "trials/total": "Trials of configurations so far.",
    "trials/seconds_total": "Time in trials so far, their training steps included, seconds.",
    "moves/bytes_total": "Bytes of weights and optimizer state that moves have sent so far.",
    "checkpoint/seconds": "How long training waited for the last checkpoint.",
    "checkpoint/bytes": "Size of the last checkpoint.",
    "failures/total": "Failures so far, those that the job outlived included.",
    "restarts/total": "Restarts from a checkpoint so far.",
    "time/productive_fraction": "Share of the time since the first start that went into steps that still count.",
}
"""Name → what it is. Names that end in `total` only grow in a run, over its restarts too."""

_REMEMBERED = tuple(
    f'{{"type":"{kind}"'.encode() for kind in ("start", "step", "reconfigure", "trial", "failure", "restart", "end")
)
"""How the lines of the log begin that `Figures.catch_up` needs; parsing the others would take far longer."""


class Figures:
    """Turns events into figures. Feed it every event, in order."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._productive = ProductiveTime()
        self._peak: float | None = None

    def catch_up(self, run: Path) -> None:
        """Count what the run's log tells of, so that a resumed run does not begin at 0."""
        try:
            with open(run / "events.jsonl", "rb") as lines:
                for line in lines:
                    if line.startswith(_REMEMBERED) and (event := parse_event(line)) is not None:
                        self.of(event)
        except FileNotFoundError:
            return

    def of(self, event: Event) -> dict[str, float]:
        """What the event has to show, finite numbers; empty for most."""
        self._productive.add(event)
        figures = self._figures(event)
        return {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}

    def _figures(self, event: Event) -> dict[str, float | None]:
        match event:
            case Step():
                rate = event.global_batch / event.seconds
                return {
                    "loss/train": event.loss,
                    "optimizer/lr": event.lr,
                    "optimizer/beta2": event.beta2,
                    "optimizer/grad_norm": event.grad_norm,
                    "experts/imbalance": event.expert_imbalance,
                    "experts/dropped_share": event.dropped_share,
                    "batch/global_batch": event.global_batch,
                    "speed/step_seconds": event.seconds,
                    "speed/samples_per_second": rate,
                    "speed/mfu": rate / self._peak if self._peak else None,
                    "time/productive_fraction": self._productive.fraction,
                }
            case Evaluate():
                return {"loss/validation": event.loss}
            case Noise():
                return {"noise/scale": event.value, "noise/low": event.low, "noise/high": event.high}
            case DecisionMade():
                return _of_decision(event)
            case Start():
                self._peak = event.peak_samples_per_second
                return _of_configuration(event.configuration)
            case Reconfigure():
                moves = {
                    "moves/total": self._count("moves/total", 1),
                    "moves/seconds_total": self._count("moves/seconds_total", event.seconds),
                    "moves/bytes_total": self._count("moves/bytes_total", event.bytes_moved),
                }
                return moves | _of_configuration(event.after)
            case Trial():
                return {
                    "trials/total": self._count("trials/total", 1),
                    "trials/seconds_total": self._count("trials/seconds_total", event.seconds),
                }
            case Checkpoint():
                return {"checkpoint/seconds": event.seconds, "checkpoint/bytes": event.bytes}
            case Failure():
                return {"failures/total": self._count("failures/total", 1)}
            case Restart():
                return {"restarts/total": self._count("restarts/total", 1)}
            case End():
                return {"time/productive_fraction": self._productive.fraction}
            case _:
                return {}

    def _count(self, name: str, more: float) -> float | None:
        self._counts[name] += more
        return self._counts[name]


def _of_decision(event: DecisionMade) -> dict[str, float | None]:
    decision = event.decision
    scores = {score.configuration: score for score in decision.candidates}
    current, chosen = scores.get(decision.current), scores.get(decision.chosen)
    return {
        "noise/critical_batch": decision.critical_batch,
        "goodput/current": current.goodput if current else None,
        "goodput/chosen": chosen.goodput if chosen else None,
        "goodput/gain": decision.predicted_gain,
        "goodput/efficiency": chosen.efficiency if chosen else None,
    }


def _of_configuration(configuration: Configuration) -> dict[str, float | None]:
    layout = configuration.layout
    return {
        "batch/global_batch": configuration.global_batch,
        "batch/micro_batch": configuration.micro_batch,
        "layout/tp": layout.tp,
        "layout/pp": layout.pp,
        "layout/dp": layout.dp,
        "layout/cp": layout.cp,
        "layout/ep": layout.ep,
        "layout/etp": layout.expert_tp,
    }
