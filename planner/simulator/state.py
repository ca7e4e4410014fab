"""Simulated runs under way."""

from dataclasses import dataclass, fields

import numpy as np

from planner.decision_times import FEWEST_STEPS_BETWEEN
from planner.forecast import QUANTILE_90, CriticalBatchForecast
from planner.menu import Floats, Indices, Menu
from planner.simulator.meter import NoiseMeter
from planner.simulator.runs import Runs
from planner.simulator.trajectory import at_progress
from profiles.online import OnlineCorrection


@dataclass
class State:
    """R runs under way, among C configurations."""

    runs: Runs
    row: Indices
    """Place of each among the runs that were begun, shape (R,)."""
    progress: Floats
    """Share of the target that is reached, shape (R,)."""
    samples: Floats
    """Sequences trained on, shape (R,)."""
    seconds: Floats
    """Time since the start, shape (R,)."""
    moves: Indices
    """As in `Outcome`."""
    trials: Indices
    """As in `Outcome`."""
    trial_seconds: Floats
    """What trials took, shape (R,)."""
    current: Indices
    """What runs, shape (R,)."""

    forecast: CriticalBatchForecast
    """φ as each run forecasts it."""
    meter: NoiseMeter
    """The averages that its noise scale is read from."""
    observed_at: Floats
    """Samples at the last reading that the forecast took in, shape (R,)."""
    factor_shift: Floats
    """What the run has learned of log c, beyond what was believed, shape (R,)."""
    factor_shift_error: Floats
    """Its standard error, shape (R,)."""
    batch_changed_at: Floats
    """Samples at the last change of batch, shape (R,)."""

    table: Floats
    """Samples a second that are predicted of each configuration before anything has run, shape (C,)."""
    table_error: Floats
    """Standard error of its logarithm, shape (C,)."""
    actual: Floats
    """Samples a second that each configuration would make at the start, shape (R, C)."""
    believed: Floats
    """Samples a second that each run believes, shape (R, C)."""
    error: Floats
    """Standard error of its logarithm, beside what runs, shape (R, C)."""
    unseen: np.ndarray
    """Which configurations never ran, shape (R, C)."""
    corrections: list[OnlineCorrection] | None
    """What each run's steps have taught of the table; None if throughputs are known."""

    @classmethod
    def beginning(cls, menu: Menu, samples_per_second: Floats, runs: Runs) -> "State":
        """Before the first step; the machine differs from the table as much as it is expected to."""
        count, size = len(runs.seed), len(menu)
        believed = np.broadcast_to(samples_per_second, (count, size)).copy()
        actual = believed.copy()
        table_error = np.broadcast_to(np.asarray(runs.throughput_error, float), (size,))
        if table_error.any():
            draws = {seed: np.random.default_rng([seed, 1]).normal(size=size) for seed in set(runs.seed.tolist())}
            actual *= np.exp(table_error * np.stack([draws[seed] for seed in runs.seed.tolist()]))
        surprising = table_error.any() or runs.drift or runs.bursts
        return cls(
            runs=runs,
            row=np.arange(count),
            progress=np.zeros(count),
            samples=np.zeros(count),
            seconds=np.zeros(count),
            moves=np.zeros((count, 3), np.int64),
            trials=np.zeros(count, np.int64),
            trial_seconds=np.zeros(count),
            current=np.zeros(count, np.int64),
            forecast=CriticalBatchForecast.unknown(runs.planned_samples),
            meter=NoiseMeter.unknown(count),
            observed_at=np.zeros(count),
            factor_shift=np.zeros(count),
            factor_shift_error=np.full(count, np.log(runs.factor_range) / QUANTILE_90),
            batch_changed_at=np.zeros(count),
            table=samples_per_second,
            table_error=table_error,
            actual=actual,
            believed=believed,
            error=np.broadcast_to(table_error, (count, size)).copy(),
            unseen=np.ones((count, size), bool),
            corrections=[OnlineCorrection() for _ in range(count)] if surprising else None,
        )

    def take(self, rows: np.ndarray) -> "State":
        """Some of the runs; `rows` is a mask of shape (R,)."""
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        corrections, table = state.pop("corrections"), {name: state.pop(name) for name in ("table", "table_error")}
        taken = {n: v[rows] if isinstance(v, np.ndarray) else v.take(rows) for n, v in state.items()}
        return State(**taken, **table, corrections=corrections and [corrections[row] for row in np.flatnonzero(rows)])

    @property
    def critical_batch(self) -> Floats:
        """The true φ, shape (R,)."""
        return at_progress(self.runs.critical_batch, self.progress)

    def samples_to_next(self, menu: Menu) -> Floats:
        """Sequences to the next decision: as `planner.decision_times.decision_interval` says, but for its doublings."""
        if self.runs.first_guess is None:
            return self.runs.every_samples
        return np.maximum(self.runs.every_samples, FEWEST_STEPS_BETWEEN * menu.global_batch[self.current])

    @property
    def trial_allowance(self) -> Floats:
        """Seconds that trials may take now, shape (R,)."""
        if np.isinf(self.runs.trial_budget):
            return np.full(len(self.row), np.inf)
        return np.maximum(self.runs.trial_budget * self.seconds - self.trial_seconds, 0.0)
