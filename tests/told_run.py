"""A small run with everything in it that a report tells of: measuring, moves, a failure, a restart, hostile text."""

from pathlib import Path
from typing import Any

from launch_events import DATA, TENSOR, candidate, decision, noise, reconfigure, start, step, write_timed_run

from copus.events import Checkpoint, DecisionMade, End, Evaluate, Event, Failure, Profile, Restart, Warned
from profiles.configuration import Configuration
from profiles.layout import Layout

HOSTILE = "</script><script>document.title = 'taken'</script><img src=http://example.invalid/x>"
"""What would run, and call home, if a page did not escape it."""
PIPE = Configuration(layout=Layout(pp=2), micro_batch=1, global_batch=4)
WIDE = DATA.model_copy(update={"global_batch": 16})
BEGAN = 1_000_000.0
"""When training began."""


def evaluate(samples: int, loss: float | None) -> Evaluate:
    """A held-out loss."""
    return Evaluate(step=samples, samples_consumed=samples, loss=loss, sequences=4, seconds=0.5)


def told_events(slower: float = 1.0) -> list[tuple[float, Event]]:
    """Events and their times. Steps take `slower` times as long."""
    events: list[tuple[float, Event]] = []
    now, samples = BEGAN - 6.0, 0

    def add(event: Event, seconds: float = 0.0) -> None:
        nonlocal now
        now += seconds * slower
        events.append((now, event))

    def train(steps: int, batch: int, seconds: float) -> None:
        nonlocal samples
        for _ in range(steps):
            samples += batch
            add(step(samples, seconds * slower, batch, loss=8.0 - samples / 100), seconds)
            if samples > 20:
                add(noise(samples, high=None if samples < 40 else 20.0))

    values: dict[str, Any] = {"step": 0, "samples_consumed": 0, "total": 3}
    for done, (configuration, seconds) in enumerate(((TENSOR, 0.08), (DATA, 0.1), (PIPE, None)), start=1):
        failure = None if seconds else "out of memory"
        measured = Profile(**values, configuration=configuration, done=done, step_seconds=seconds, failure=failure)
        add(measured, 2.0 if done > 1 else 0.0)
    add(start(), 2.0)
    add(evaluate(0, 8.2), 0.5)
    train(15, 4, 0.1)
    add(asked(0, samples, TENSOR, DATA))
    add(reconfigure(0, samples, TENSOR, DATA), 2.5)
    train(10, 8, 0.11)
    add(evaluate(samples, 6.0), 0.5)
    add(Checkpoint(step=samples, samples_consumed=samples, path="checkpoints/one", seconds=0.25, bytes=1000), 0.25)
    kept = samples
    train(3, 8, 0.11)  # lost
    add(Failure(step=0, samples_consumed=0, rank=1, message=f"killed by {HOSTILE}"), 0.5)
    values = {"resumed_from": "checkpoints/one", "samples_repeated": samples - kept, "ranks": 2}
    add(Restart(step=kept, samples_consumed=kept, attempt=1, **values), 4.0)
    samples = kept
    add(start(kept, DATA, resumed_from="checkpoints/one"))
    train(3, 8, 0.11)
    add(Warned(step=samples, samples_consumed=samples, message=f"look at {HOSTILE}"))
    add(asked(1, samples, DATA, WIDE))
    add(reconfigure(1, samples, DATA, WIDE).model_copy(update={"rung": "batch", "seconds": 0.001, "bytes_moved": 0}))
    train(12, 16, 0.2)
    add(asked(2, samples, WIDE, WIDE))
    add(evaluate(samples, 4.5), 0.5)
    add(End(step=samples, samples_consumed=samples, reason="max_minutes", seconds=now - BEGAN))
    return events


def asked(number: int, samples: int, current: Configuration, chosen: Configuration) -> DecisionMade:
    """A decision among all three layouts, with a hostile reason."""
    made = decision(number, samples, current, chosen)
    others = [
        candidate(PIPE, f"slower {HOSTILE}", 0.15),
        candidate(PIPE.model_copy(update={"global_batch": 8}), "slower", 0.25),
        candidate(TENSOR.model_copy(update={"global_batch": 8}), "slower", 0.2),
    ]
    whole = made.decision.model_copy(update={"candidates": [*made.decision.candidates, *others], "reason": HOSTILE})
    return made.model_copy(update={"decision": whole})


def write_told_run(folder: Path, slower: float = 1.0) -> Path:
    """The run directory, with hostile text in its job file too."""
    run = write_timed_run(folder, *told_events(slower))
    (run / "job.yaml").write_text(
        f'name: "{HOSTILE}"\nmodel: {{seq_len: 32, vocab: 384}}\ntraining: {{seed: 1}}\n'
        f"planner: {{policy: copus}}\nprofile: {{options: {{api_key: hunter2, depth: 3}}}}\n"
    )
    return run
