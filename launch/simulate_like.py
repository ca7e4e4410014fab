"""What `copus simulate --like RUN` takes from a run: its noise scales, its length, its moves, and its machine."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from copus.audit import past_run_of
from copus.event_lines import without_replays
from copus.events import Noise, Reconfigure, Trial, read_events
from copus.job import JobError
from launch.run_directory import shown
from planner.menu import Floats, rung_of
from planner.simulator.trajectory import through


def trajectory_of(run: Path, critical_batch_factor: float) -> Floats:
    """φ over the progress, from the noise scales that the run measured. Raises JobError if there are none."""
    events = without_replays(read_events(run))
    seen = [(e.samples_consumed, e.value) for e in events if isinstance(e, Noise) and e.value and e.value > 0]
    total = max((e.samples_consumed for e in events), default=0)  # a run may stop early, and a resume lengthen it
    if not seen or not total:
        raise JobError(f"--like {shown(run)}: the run has measured no noise scale")
    return through([done / total for done, _ in seen], [critical_batch_factor * (value or 0.0) for _, value in seen])


class ObservedRun(NamedTuple):
    """What a run did, to be compared with what is expected of it."""

    samples: int
    """Sequences that it trained on."""
    layout_moves: int
    """Lasting moves to another layout after the first step."""
    batch_moves: int
    """Other lasting moves after the first step."""
    trials: int
    """Trials."""
    layout_seconds: float | None
    """Median of what its moves to another layout took; None without any."""
    drift: float
    """How much its machine wandered, slowly: standard deviation of the logarithm of its speed."""
    bursts: float
    """Share of the time in which half of its machine would have had to be taken for the quick part of that."""


def observe(run: Path) -> ObservedRun:
    """What a run that trained did."""
    events = without_replays(read_events(run))
    moves = [e for e in events if isinstance(e, Reconfigure) and not e.trial and e.samples_consumed]
    trials = [e for e in events if isinstance(e, Trial)]
    kept = [rung_of(e.running, e.candidate) for e in trials if e.outcome == "stayed"]
    rungs = [e.rung for e in moves] + kept
    seconds = [e.seconds for e in events if isinstance(e, Reconfigure) and e.rung == "layout"]
    past = past_run_of(run)
    machine = None if past is None else past.step_times()
    return ObservedRun(
        samples=max(e.samples_consumed for e in events),
        layout_moves=rungs.count("layout"),
        batch_moves=len(rungs) - rungs.count("layout"),
        trials=len(trials),
        layout_seconds=float(np.median(seconds)) if seconds else None,
        drift=machine.drift if machine else 0.0,
        bursts=min((machine.bursts / math.log(2)) ** 2, 0.5) if machine else 0.0,
    )
