"""What a run that is over would have taken otherwise: in one configuration, or on the best schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from planner.forecast import QUANTILE_90
from planner.goodput import Objective, progress_per_sample
from planner.menu import Floats, Indices, Menu
from planner.plan import plan_run
from planner.step_times import StepTimes, fit_step_times
from profiles.audit import Estimate
from profiles.configuration import Configuration

BINS = 60
"""Equal shares of the run's sequences in which φ is taken as constant."""
STAGES = 40
"""Equal shares of the progress in which the best schedule may change configuration."""
DRAWS = 400
"""Draws that intervals are the percentiles of: the ends of a 90 % interval are then known to a few percent of it."""
NOISE_MEMORY = 0.05
"""Share of the run over which errors of the noise scale are alike: it is a moving average."""
FACTOR_ERROR = math.log(2.6) / QUANTILE_90
"""Standard error of log c in runs that do not say it: a factor of 2.6 either way holds 90 %."""
FEWEST_STEPS = 3
"""Settled steps that a configuration's time is taken from; with fewer the planner's prediction stands in."""

WIDEST = 0.25
"""Candidates that never ran are neither the best fixed configuration nor in the best schedule if their time is less
certain than this (standard error of its logarithm): the best of many guesses is a bad one."""


@dataclass(frozen=True)
class PredictedTime:
    """A step time that was predicted beside that of a configuration that ran: what slows both cancels."""

    beside: int
    """Number of the configuration that ran."""
    log_ratio: float
    """Logarithm of the predicted step time over the predicted step time of that one."""
    error: float
    """Standard error of `log_ratio`."""


@dataclass(frozen=True)
class PastRun:
    """The steps of a run as arrays of shape (N,), in order, and what else it takes to compare it with other runs."""

    configurations: Sequence[Configuration]
    """The first is the one that training began in."""
    configuration: Indices
    """Number of the configuration that each step ran in."""
    batch: Floats
    """Sequences of each step: at the end of a run fewer than the configuration's."""
    seconds: Floats
    """Duration of each step."""
    at: Floats
    """When each step ended, seconds."""
    settled: np.ndarray
    """Whether the step's time counts: the first two after a start or a move also warm up."""
    noise_samples: Floats
    """Sequences trained on when the noise scale was estimated, shape (M,)."""
    noise_log: Floats
    """Logarithms of the estimates, shape (M,)."""
    noise_error: Floats
    """Their standard errors, shape (M,)."""
    factor: float
    """c in φ = c · B_simple."""
    lost_seconds: float
    """Time beside the steps that a run in one configuration does not need: moves and decisions."""
    move_seconds: Floats
    """Cost of a new batch, micro-batch, layout; ascending, shape (3,)."""
    predicted: dict[int, PredictedTime]
    """Configurations that could have been chosen, but for which the run has no settled steps."""
    objective: Objective = "plain"
    """Form of Goodput, and of progress."""
    factor_error: float = FACTOR_ERROR
    """Standard error of log c."""

    @property
    def timed(self) -> Indices:
        """Numbers of the configurations with enough settled steps."""
        counted = np.bincount(self.configuration[self.settled], minlength=len(self.configurations))
        return np.flatnonzero(counted >= FEWEST_STEPS)

    def step_times(self) -> StepTimes | None:
        """Step times of the configurations that are `timed`, in their order, and how the machine wandered; None without
        any."""
        timed = self.timed
        if not len(timed):
            return None
        counted = np.isin(self.configuration, timed) & self.settled
        numbers = np.searchsorted(timed, self.configuration[counted])
        return fit_step_times(numbers, self.seconds[counted], self.at[counted])

    @property
    def own_seconds(self) -> float:
        """Time that is compared with that of other runs."""
        return float(self.seconds.sum()) + self.lost_seconds


@dataclass(frozen=True)
class Hindsight:
    """How long other ways to the same progress would have taken, relative to the run; in percent."""

    gain_over_first: Estimate | None
    """Time of the first configuration over that of the run, minus 1; None if its step time is unknown."""
    best_fixed: int
    """Number of the best fixed configuration."""
    best_fixed_ran: bool
    """Whether the run timed it itself."""
    gain_over_best_fixed: Estimate
    """Time of the best fixed configuration over that of the run, minus 1."""
    regret_to_best_schedule: Estimate
    """Time of the run over that of the best schedule, minus 1."""


def look_back(run: PastRun, seed: int = 0) -> Hindsight | None:
    """Compare a run with what it could have done. None while its noise scale, or every step time, is unknown.

    A step of batch b makes b · SE(b) of progress at the φ of its moment, and every other way has to make the same
    progress at the same φ: a fixed batch B needs Σ b · SE(b) / SE(B) sequences. Each configuration runs at its own
    step time, and all of them on the machine as it was on average in this run (`planner.step_times`).

    The best fixed configuration and the best schedule (`planner.plan`) are chosen at the middle of what is known, once;
    then all times are drawn together from what is not known: c, the noise scale's interval, the step times. A minimum
    of draws would flatter hindsight.
    """
    timed = run.timed
    if not len(run.noise_log) or not len(timed):
        return None
    rng = np.random.default_rng(seed)
    numbers, log_seconds = _draw_step_times(run, timed, rng)
    critical_batch = _draw_critical_batch(run, rng)
    amounts = _amounts(run)
    batches = np.array([configuration.global_batch for configuration in run.configurations], float)
    batches = batches[numbers]

    progress = _progress(run, amounts, critical_batch)
    needed = _needed(progress, critical_batch, batches, run.objective)  # sequences, (draws, known)
    seconds_per_sample = np.exp(log_seconds) / batches
    slowdown = _slowdown(run, numbers, log_seconds)
    fixed = slowdown * needed * seconds_per_sample
    own = run.own_seconds

    sure = np.array(
        [number not in run.predicted or run.predicted[number].error <= WIDEST for number in numbers.tolist()]
    )
    best = int(np.argmin(np.where(sure, np.log(fixed).mean(axis=0), np.inf)))
    first = np.flatnonzero(numbers == 0)
    scheduled = _scheduled_seconds(run, numbers[sure], log_seconds[:, sure], critical_batch, progress, slowdown)
    return Hindsight(
        gain_over_first=_estimate(fixed[:, first[0]] / own) if len(first) else None,
        best_fixed=int(numbers[best]),
        best_fixed_ran=bool(numbers[best] in timed),
        gain_over_best_fixed=_estimate(fixed[:, best] / own),
        regret_to_best_schedule=_estimate(own / scheduled),
    )


def _estimate(ratios: Floats) -> Estimate:
    """Percent over 1: median, 5th and 95th percentile of the draws."""
    low, value, high = (100 * (float(part) - 1) for part in np.percentile(ratios, (5, 50, 95)))
    return Estimate(value=value, low=low, high=high)


def _draw_step_times(run: PastRun, timed: Indices, rng: np.random.Generator) -> tuple[Indices, Floats]:
    """Numbers of the configurations whose time is known, shape (K,), and draws of their log seconds, (draws, K). The
    first draw is the middle."""
    fit = run.step_times()
    assert fit is not None, "something was timed"
    draws = rng.multivariate_normal(fit.mean, fit.covariance, DRAWS, method="eigh")
    draws[0] = fit.mean
    columns, numbers = [draws], list(timed)
    place = {int(number): column for column, number in enumerate(timed)}
    for number, predicted in run.predicted.items():
        if number not in place and predicted.beside in place:
            error = predicted.error * rng.standard_normal(DRAWS)
            error[0] = 0.0
            columns.append((draws[:, place[predicted.beside]] + predicted.log_ratio + error)[:, None])
            numbers.append(np.int64(number))
    return np.array(numbers), np.concatenate(columns, axis=1)


def _bin_of(run: PastRun, samples: Floats) -> Indices:
    """The share of the run's sequences that each of these lies in."""
    total = float(run.batch.sum())
    return np.clip((samples / total * BINS).astype(np.int64), 0, BINS - 1)


def _draw_critical_batch(run: PastRun, rng: np.random.Generator) -> Floats:
    """Draws of φ in every bin, shape (draws, BINS); the first is the middle. Before the first estimate, and between two
    that are bins apart, it is interpolated on the logarithm."""
    bins = _bin_of(run, run.noise_samples)
    filled = np.unique(bins)
    log = np.array([np.median(run.noise_log[bins == place]) for place in filled])
    error = np.array([np.median(run.noise_error[bins == place]) for place in filled])
    everywhere = np.arange(BINS)
    middle, half = np.interp(everywhere, filled, log), np.interp(everywhere, filled, error)
    alike = np.exp(-np.abs(everywhere[:, None] - everywhere) / (BINS * NOISE_MEMORY))
    wander = rng.standard_normal((DRAWS, BINS)) @ np.linalg.cholesky(alike).T
    level = run.factor_error * rng.standard_normal((DRAWS, 1))
    wander[0], level[0] = 0.0, 0.0
    return np.asarray(run.factor * np.exp(middle + half * wander + level))


def _amounts(run: PastRun) -> Floats:
    """Sequences trained on in each bin with each configuration, shape (BINS, C)."""
    bins = _bin_of(run, np.cumsum(run.batch) - run.batch / 2)
    amounts = np.zeros((BINS, len(run.configurations)))
    np.add.at(amounts, (bins, run.configuration), run.batch)
    return amounts


def _progress(run: PastRun, amounts: Floats, critical_batch: Floats) -> Floats:
    """Effective sequences of each bin, shape (draws, BINS)."""
    progress = np.zeros_like(critical_batch)
    for number in np.flatnonzero(amounts.sum(axis=0)).tolist():
        batch = run.configurations[number].global_batch
        progress += amounts[:, number] * progress_per_sample(batch, critical_batch, run.objective)
    return progress


def _needed(progress: Floats, critical_batch: Floats, batches: Floats, objective: Objective) -> Floats:
    """Sequences that each batch needs for all of the progress, shape (draws, K)."""
    needed = {
        batch: (progress / progress_per_sample(batch, critical_batch, objective)).sum(axis=1)
        for batch in np.unique(batches)
    }
    return np.stack([needed[batch] for batch in batches], axis=1)


def _slowdown(run: PastRun, numbers: Indices, log_seconds: Floats) -> Floats:
    """How much longer the settled steps took than on the machine in its mean state, shape (draws, 1)."""
    column = np.full(len(run.configurations), -1)
    column[numbers] = np.arange(len(numbers))
    counted = run.settled & (column[run.configuration] >= 0)
    full = np.array([configuration.global_batch for configuration in run.configurations], float)
    steps = np.zeros(len(numbers))
    np.add.at(steps, column[run.configuration[counted]], run.batch[counted] / full[run.configuration[counted]])
    return np.asarray(run.seconds[counted].sum() / (np.exp(log_seconds) @ steps))[:, None]


def _scheduled_seconds(
    run: PastRun, numbers: Indices, log_seconds: Floats, critical_batch: Floats, progress: Floats, slowdown: Floats
) -> Floats:
    """Duration of the best schedule for the middle of what is known, by what each draw knows; shape (draws,)."""
    menu = Menu.of([run.configurations[number] for number in numbers])
    total = float(progress[0].sum())
    reached = np.cumsum(progress[0]) - progress[0] / 2
    middles = (np.arange(STAGES) + 0.5) / STAGES
    phi = np.exp(np.interp(middles, reached / total, np.log(critical_batch[0])))
    rate = menu.global_batch / (slowdown[0, 0] * np.exp(log_seconds[0]))
    plan = plan_run(menu, rate, phi, total, run.move_seconds, run.objective)
    chosen = np.zeros(BINS, np.int64)
    for stretch in plan.schedule:
        chosen[reached / total >= stretch.first] = stretch.index
    order = [stretch.index for stretch in plan.schedule]
    moves = sum(float(menu.move_seconds(np.array([a]), run.move_seconds)[0, b]) for a, b in pairwise(order))
    needed = progress / progress_per_sample(menu.global_batch[chosen], critical_batch, run.objective)
    seconds = (needed * np.exp(log_seconds[:, chosen]) / menu.global_batch[chosen]).sum(axis=1)
    return np.asarray(seconds * slowdown[:, 0] + moves)
