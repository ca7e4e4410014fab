"""A written run: events as a trainer would write them, for the tests of what reads them."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from copus.event_lines import read_decision
from copus.event_log import EventLog
from copus.events import DecisionMade, DecisionTaken, Event, Noise, Reconfigure, Start, Step, Trial, read_events
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision
from profiles.layout import Layout
from profiles.noise_scale import NoiseScale

SEQ_LEN = 32
TOTAL_SAMPLES = 400
TENSOR = Configuration(layout=Layout(tp=2), micro_batch=1, global_batch=4)
DATA = Configuration(layout=Layout(dp=2), micro_batch=2, global_batch=8)
NOISE = NoiseScale(grad_sq=0.5, noise_trace=6.0, value=12.0, low=9.0, high=20.0, samples=40)


def start(samples: int = 0, configuration: Configuration = TENSOR, resumed_from: str | None = None) -> Start:
    """Workers are up."""
    return Start(
        step=0,
        samples_consumed=samples,
        configuration=configuration,
        total_samples=TOTAL_SAMPLES,
        seq_len=SEQ_LEN,
        resumed_from=resumed_from,
        hardware="none",
        software="none",
    )


def step(samples: int, seconds: float = 0.1, global_batch: int = 4, loss: float | None = 3.0) -> Step:
    """A step that ended at this many samples."""
    values: dict[str, Any] = {"grad_norm": 1.0, "lr": 1e-3, "beta2": 0.95}
    return Step(step=samples, samples_consumed=samples, loss=loss, seconds=seconds, global_batch=global_batch, **values)


def noise(samples: int, high: float | None = 20.0) -> Noise:
    """The noise after a step."""
    return Noise(step=0, samples_consumed=samples, value=12.0, low=9.0, high=high, noise=NOISE, parts=2, part_size=1)


def candidate(configuration: Configuration, verdict: str, step_seconds: float | None = 0.1) -> CandidateScore:
    """A candidate with plausible numbers; None: not measured."""
    if step_seconds is None:
        numbers = dict.fromkeys(("step_seconds_spread", "samples_per_second", "efficiency", "goodput", "gain"))
        return CandidateScore(configuration=configuration, step_seconds=None, source="none", verdict=verdict, **numbers)
    rate = configuration.global_batch / step_seconds
    return CandidateScore(
        configuration=configuration,
        step_seconds=step_seconds,
        step_seconds_spread=step_seconds / 10,
        source="measured",
        samples_per_second=rate,
        efficiency=0.75,
        goodput=0.75 * rate,
        gain=rate / 40 - 1,
        verdict=verdict,
    )


def decision(
    number: int, samples: int, current: Configuration, chosen: Configuration, others: list[Configuration] | None = None
) -> DecisionMade:
    """The planner ran. `others` are candidates between the chosen and the current one, not measured."""
    candidates = [candidate(chosen, "CHOSEN")]
    candidates += [candidate(other, "not measured", None) for other in others or []]
    if current != chosen:
        candidates.append(candidate(current, "current"))
    return DecisionMade(
        step=samples,
        samples_consumed=samples,
        seconds=0.002,
        decision=Decision(
            number=number,
            samples_consumed=samples,
            policy="copus",
            objective="plain",
            noise=NOISE,
            critical_batch_factor=2.0,
            critical_batch=24.0,
            current=current,
            chosen=chosen,
            candidates=candidates,
            predicted_gain=None if current == chosen else 1.0,
            reason="because of [this]",
        ),
    )


def reconfigure(number: int, samples: int, before: Configuration, after: Configuration) -> Reconfigure:
    """The job moved."""
    return Reconfigure(
        step=samples,
        samples_consumed=samples,
        before=before,
        after=after,
        rung="layout",
        seconds=2.5,
        bytes_moved=10,
        decision=number,
    )


def trial(number: int, samples: int, outcome: str) -> Trial:
    """A trial of DATA beside TENSOR ended."""
    values: dict[str, Any] = {"steps": 6, "seconds": 3.0, "move_seconds": 1.0, "outcome": outcome, "decision": number}
    values |= {"ratio": 1.32, "ratio_low": 1.2, "ratio_high": 1.45}
    return Trial(step=samples, samples_consumed=samples, candidate=DATA, running=TENSOR, **values)


def write_run(folder: Path, *events: Any) -> Path:
    """A run directory with these events, and a job file that nobody but `find_run` looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").touch()
    log = EventLog(folder)
    for event in events:
        log.write(event)
    log.close()
    return folder


def write_timed_run(folder: Path, *events: tuple[float, Event]) -> Path:
    """A run directory with these events at these times, seconds since the epoch."""
    write_run(folder)
    for name in ("events.jsonl", "decisions.jsonl"):
        (folder / name).unlink(missing_ok=True)
    log = EventLog(folder)
    for when, event in events:
        with patch("copus.event_log.clock.time", return_value=when):
            log.write(event)
    log.close()
    return folder


def write_former_log(run: Path) -> None:
    """Turn the log of a run into one of schema version 1, in which whole decisions stand among the events."""
    events = list(read_events(run))
    whole = [read_decision(run, event) if isinstance(event, DecisionTaken) else event for event in events]
    (run / "decisions.jsonl").unlink()
    lines = (event.model_copy(update={"schema_version": 1}).model_dump_json() for event in whole if event)
    (run / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))
