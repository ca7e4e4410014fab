"""Many runs of a policy at once."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np

from planner.critical_batch_factor import NEAR, SYSTEMATIC
from planner.decision_times import FEWEST_STEPS_BETWEEN
from planner.forecast import LAWS_ERROR, QUANTILE_90, CriticalBatchForecast
from planner.goodput import Objective, progress_per_sample
from planner.menu import Floats, Indices, Menu
from planner.plan import Plan, plan_run
from planner.policies.policy import Policy
from planner.simulator.meter import NoiseMeter
from planner.situation import Choice, Situation
from planner.trials import EXPECTED_STEPS, SETTLING_STEPS
from profiles.online import OnlineCorrection

KNOWN_STEPS = 20
"""Steps after which a job knows its noise scale (`planner.min_noise_samples`)."""
EARLY = 0.03
"""Share of the progress in which an early error of φ falls to 1/e of its logarithm."""
DRAWS = 1024
"""Errors of noise estimates that a seed makes; a longer run begins anew with the first."""
TRIAL_ERROR = 0.03
"""Standard error of the logarithm of the ratio that a trial measures, on a machine with bursts."""
LOSS_SLOPE = 0.25
"""Nats a token that the loss falls by in an e-folding of samples: how much a change of batch has to show."""
LOSS_NOISE = 0.5
"""Standard deviation of the loss of a sequence, nats per token (docs/calibration.md)."""


@dataclass(frozen=True)
class Runs:
    """R runs to simulate. Samples and batches are in sequences."""

    critical_batch: Floats
    """True φ on the grid of `planner.simulator.trajectory`, shape (R, POINTS)."""
    progress: Floats
    """Effective samples that the target takes, shape (R,)."""
    planned_samples: Floats
    """Length of the job as its file says, shape (R,): what policies believe is left of."""
    every_samples: Floats
    """Sequences between two decisions, shape (R,)."""
    move_seconds: Floats
    """Cost of a new batch, micro-batch, layout; shape (R, 3), ascending."""
    seed: Indices
    """Seeds, shape (R,). Equal seeds have equal errors, whatever the policy."""
    noise: Floats
    """Standard deviation of the logarithm of a noise estimate, shape (R,)."""
    factor_error: Floats
    """What c is believed to be over what it is, shape (R,)."""
    correlation: float = 0.0
    """Correlation of the errors of successive estimates."""
    throughput_error: float | tuple[float, ...] = 0.0
    """Standard deviation of the logarithm of predicted throughputs, of all configurations or of each; steps correct
    them as in a job (`profiles.online`)."""
    drift: float = 0.0
    """Standard deviation that the logarithm of the machine's speed reaches by the end, as a random walk, and a quarter
    of it for what each layout does besides."""
    bursts: float = 0.0
    """Share of the time between decisions in which something else takes half of the machine."""
    trial_budget: float = np.inf
    """Share of the elapsed time that trials may take."""
    factor_range: float = 1.0
    """How far the 90 % interval of c reaches either way at first, as a factor: changes of batch then teach it. 1: what
    is believed of c stays."""
    first_guess: Floats | None = None
    """What laws say of φ before the first step over what it is, shape (R,): a start in the dark, as of a job. The noise
    scale is then an average over the steps so far (`planner.simulator.meter`), unknown for the first `KNOWN_STEPS`, and
    its errors are those of the steps, not `noise`. None: the job begins with one estimate of φ, without any lag."""
    early_error: Floats | None = None
    """What φ is believed to be over what it is at the very beginning, beyond the error of c, shape (R,). It fades over
    the first `EARLY` of the progress."""
    lr_decay: Callable[[float], float] | None = None
    """Learning rate that the schedule says after so many sequences, over its peak; None without a schedule."""
    start_batch: Floats | None = None
    """Global batch of the job file, sequences, shape (R,), which schedules grow from; None for the smallest."""
    start: Indices | None = None
    """What runs first, shape (R,), and is left at the cost of a move; None where the policy picks it, for nothing."""

    def take(self, rows: np.ndarray) -> "Runs":
        """Some of the runs."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: a[rows] for name, a in arrays.items() if isinstance(a, np.ndarray)})


@dataclass(frozen=True)
class Outcome:
    """What became of R runs."""

    seconds: Floats
    """Time to the target, moves included, shape (R,)."""
    samples: Floats
    """Sequences trained on, shape (R,)."""
    moves: Indices
    """Moves made, by rung (batch, micro-batch, layout), shape (R, 3); those of trials that went back are left out."""
    trials: Indices
    """Trials made, shape (R,)."""
    paths: tuple[list[tuple[float, int]], ...] = ()
    """For each run the progress at which each configuration began; empty unless asked for."""


@dataclass
class _State:
    """R runs under way."""

    runs: Runs
    row: Indices
    forecast: CriticalBatchForecast
    progress: Floats
    samples: Floats
    seconds: Floats
    moves: Indices
    trials: Indices
    current: Indices
    table: Floats
    """Samples a second of each configuration before anything has run, shape (C,)."""
    table_error: Floats
    """Standard error of its logarithm, shape (C,)."""
    believed: Floats
    error: Floats
    actual: Floats
    unseen: np.ndarray = field(repr=False)
    spent: Floats
    """Seconds that trials took, shape (R,)."""
    shift: Floats
    """What the run has taught of log c, beyond what was believed, shape (R,)."""
    shift_error: Floats
    """Its standard error, shape (R,)."""
    changed_at: Floats
    """Samples at the last change of batch, shape (R,)."""
    meter: NoiseMeter
    observed_at: Floats
    """Samples at the last estimate that the forecast took in, shape (R,)."""
    live: list[OnlineCorrection] | None
    """What each run's steps taught; None where throughputs are known."""

    def keep(self, rows: np.ndarray) -> "_State":
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        live, table = state.pop("live"), {name: state.pop(name) for name in ("table", "table_error")}
        taken = {n: v[rows] if isinstance(v, np.ndarray) else v.take(rows) for n, v in state.items()}
        return _State(**taken, **table, live=live and [live[row] for row in np.flatnonzero(rows)])


def simulate(
    menu: Menu,
    samples_per_second: Floats,
    runs: Runs,
    policy: Policy,
    objective: Objective = "plain",
    record: bool = False,
) -> Outcome:
    """Train every run to its target with the decisions of `policy`.

    Progress follows the model that Goodput is made from: S sequences at batch B make S / (1 + B/φ) of it (times √B
    with the lr-aware objective), so this compares decisions, and says nothing about whether the model is right.
    Policies see φ with errors, and otherwise what the trainer shows them. Where `runs.start` does not say, the job
    begins in what the policy picks after a first estimate, which costs nothing; or, where it does not pick, in the
    best Goodput of that estimate.
    """
    count, errors = len(runs.seed), _errors(runs)
    walk = _walks(runs, menu)
    state = _begin(menu, np.asarray(samples_per_second, float), runs)
    done_seconds, done_samples = np.zeros(count), np.zeros(count)
    done_moves, done_trials = np.zeros((count, 3), np.int64), np.zeros(count, np.int64)
    paths: tuple[list[tuple[float, int]], ...] = tuple([] for _ in range(count))
    number = 0
    while len(state.row):
        runs = state.runs
        true_phi = _read(runs.critical_batch, state.progress)
        draws = errors[state.row, number % DRAWS]
        if runs.first_guess is None:
            seen, place, forecast = _estimate(state, true_phi * np.exp(draws * runs.noise))
        elif number == 0:
            seen, place, forecast = _guess(state, true_phi)
        else:
            seen, place, forecast = _measured(state)
        learned = np.exp(state.shift)
        situation = Situation(
            menu=menu,
            samples_per_second=state.believed,
            throughput_error=state.error,
            unseen=state.unseen,
            current=state.current,
            noise_scale=seen / 2,
            critical_batch=seen * learned,
            forecast=forecast,
            samples_consumed=place,
            samples_left=np.maximum(runs.planned_samples - state.samples, runs.every_samples),
            samples_to_next=_to_next(menu, state),
            move_seconds=runs.move_seconds,
            trial_allowance=_allowance(state),
            objective=objective,
            number=number,
            started=number > 0 or runs.start is not None,
            lr_decay=None if runs.lr_decay is None else np.array([runs.lr_decay(at) for at in state.samples.tolist()]),
            start_batch=runs.start_batch,
        )
        if number == 0:
            state.current = np.argmax(situation.goodput(seen), axis=1) if runs.start is None else runs.start
            situation = replace(situation, current=state.current)
        situation = replace(situation, plug_in=seen / 2 / (1 + seen / 2 / situation.running_batch))
        choice = policy.choose(situation)
        index = choice.index if number or runs.first_guess is None or runs.start is None else state.current
        if choice.exploring is not None and choice.exploring.any() and situation.started:
            index = _try(menu, state, choice, situation, _speed(state, walk, number), objective)
        if record:
            for place_in, (row, before, after) in enumerate(zip(state.row, state.current, index, strict=True)):
                if number == 0 or before != after:
                    paths[row].append((float(state.progress[place_in]), int(after)))
        if situation.started:
            _pay(menu, state, index)
            _learn_factor(menu, state, index, true_phi)
        state.current = index
        finished = _advance(menu, state, _speed(state, walk, number), objective, number, draws)
        number += 1
        if finished.any():
            rows = state.row[finished]
            done_seconds[rows], done_samples[rows] = state.seconds[finished], state.samples[finished]
            done_moves[rows], done_trials[rows] = state.moves[finished], state.trials[finished]
            state = state.keep(~finished)
    return Outcome(done_seconds, done_samples, done_moves, done_trials, paths if record else ())


def best_fixed_seconds(menu: Menu, samples_per_second: Floats, runs: Runs, objective: Objective = "plain") -> Floats:
    """What the configuration takes that is the fastest of all from start to target, by the true times of each run;
    shape (R,). Nobody decides or learns anything."""
    count, size = len(runs.seed), len(menu)
    every = runs.take(np.repeat(np.arange(count), size))  # each run in each configuration
    walk = _walks(every, menu)
    state = _begin(menu, np.asarray(samples_per_second, float), replace(every, first_guess=None))
    state.live, state.current = None, np.tile(np.arange(size), count)
    best = np.full(count, np.inf)
    number = 0
    while len(state.row):
        finished = _advance(menu, state, _speed(state, walk, number), objective, number, np.zeros(len(state.row)))
        run = state.row // size
        np.minimum.at(best, run[finished], state.seconds[finished])
        state, number = state.keep(~finished & (state.seconds < best[run])), number + 1
    return best


def _estimate(state: _State, seen: Floats) -> tuple[Floats, Floats, CriticalBatchForecast]:
    """An estimate of φ now, without any lag; where the run is; and the forecast."""
    runs = state.runs
    seen = seen * runs.factor_error
    place = np.maximum(state.samples, runs.every_samples / 2)
    state.forecast.observe(place, seen, np.maximum(runs.noise, 0.01), (1 - runs.correlation) / (1 + runs.correlation))
    return seen, place, _with_factor(state)


def _with_factor(state: _State) -> CriticalBatchForecast:
    """The forecast with what the run has learned of c."""
    return state.forecast.scaled(np.exp(state.shift), state.shift_error)


def _guess(state: _State, true_phi: Floats) -> tuple[Floats, Floats, CriticalBatchForecast]:
    """What laws say before the first step."""
    assert state.runs.first_guess is not None
    place = np.ones_like(true_phi)
    guess = true_phi * state.runs.first_guess
    prior = CriticalBatchForecast.unknown(state.runs.planned_samples)
    prior.observe(place, guess, np.full_like(place, LAWS_ERROR))
    return guess, place, prior


def _measured(state: _State) -> tuple[Floats, Floats, CriticalBatchForecast]:
    """φ now by the averages, as `Planner` works it out: filed at their centroid, and grown since as forecast."""
    meter, here = state.meter, state.samples
    error = np.sqrt(meter.variance)
    memory = np.maximum(here - meter.centroid, 1e-9)
    repeated = np.where(state.observed_at > 0, np.exp(-np.maximum(here - state.observed_at, 1) / memory), 0.0)
    state.forecast.observe(meter.centroid, meter.average, error, (1 - repeated) / (1 + repeated))
    state.observed_at = here.copy()
    return meter.average * state.forecast.grown(meter.centroid, here), here, _with_factor(state)


def _to_next(menu: Menu, state: _State) -> Floats:
    """Sequences to the next decision: as `planner.decision_times.decision_interval` says, but for its doublings."""
    runs = state.runs
    if runs.first_guess is None:
        return runs.every_samples
    return np.maximum(runs.every_samples, FEWEST_STEPS_BETWEEN * menu.global_batch[state.current])


def oracle(
    menu: Menu,
    samples_per_second: Floats,
    critical_batch: Floats,
    progress: float,
    move_seconds: Floats,
    objective: Objective = "plain",
    start: int | None = None,
) -> Plan:
    """The bound: the plan of somebody who knows φ and pays the same for moves, and the best fixed configuration."""
    middles = np.sqrt(critical_batch[1:] * critical_batch[:-1])
    return plan_run(menu, samples_per_second, middles, progress, move_seconds, objective, start)


def _begin(menu: Menu, believed: Floats, runs: Runs) -> _State:
    count, size = len(runs.seed), len(menu)
    rows = np.broadcast_to(believed, (count, size)).copy()
    actual = rows.copy()
    table_error = np.broadcast_to(np.asarray(runs.throughput_error, float), (size,))
    if table_error.any():
        draws = {seed: np.random.default_rng([seed, 1]).normal(size=size) for seed in set(runs.seed.tolist())}
        actual *= np.exp(table_error * np.stack([draws[seed] for seed in runs.seed.tolist()]))
    return _State(
        runs=runs,
        row=np.arange(count),
        forecast=CriticalBatchForecast.unknown(runs.planned_samples),
        progress=np.zeros(count),
        samples=np.zeros(count),
        seconds=np.zeros(count),
        moves=np.zeros((count, 3), np.int64),
        trials=np.zeros(count, np.int64),
        current=np.zeros(count, np.int64),
        table=believed,
        believed=rows,
        table_error=table_error,
        error=np.broadcast_to(table_error, (count, size)).copy(),
        actual=actual,
        unseen=np.ones((count, size), bool),
        spent=np.zeros(count),
        shift=np.zeros(count),
        shift_error=np.full(count, np.log(runs.factor_range) / QUANTILE_90),
        changed_at=np.zeros(count),
        meter=NoiseMeter.unknown(count),
        observed_at=np.zeros(count),
        live=[OnlineCorrection() for _ in range(count)] if table_error.any() or runs.drift or runs.bursts else None,
    )


def _errors(runs: Runs) -> Floats:
    """Standard normal errors of estimates, one row a run, equal for equal seeds; shape (R, DRAWS)."""
    rows = {}
    for seed in set(runs.seed.tolist()):
        white = np.random.default_rng([seed, 0]).normal(size=DRAWS)
        if runs.correlation:
            for i in range(1, DRAWS):
                white[i] = runs.correlation * white[i - 1] + np.sqrt(1 - runs.correlation**2) * white[i]
        rows[seed] = white
    return np.stack([rows[seed] for seed in runs.seed.tolist()])


def _walks(runs: Runs, menu: Menu) -> Floats | None:
    """Logarithm of how much faster each layout is than at the start, shape (R, DRAWS, layouts); None without drift."""
    if not runs.drift and not runs.bursts:
        return None
    layouts = int(menu.layout.max()) + 1
    share = np.array([0.25] * layouts + [1.0])
    per_decision = runs.drift / np.sqrt(np.maximum(runs.planned_samples / runs.every_samples, 1.0))
    steps = [np.random.default_rng([s, 2]).normal(size=(DRAWS, layouts + 1)) * share for s in runs.seed.tolist()]
    walks = np.cumsum(np.stack(steps), axis=1) * per_decision[:, None, None]
    return np.asarray(walks[:, :, :-1] + walks[:, :, -1:])


def _pay(menu: Menu, state: _State, index: Indices) -> None:
    """Count the moves and the time that they take."""
    moved = index != state.current
    if not moved.any():
        return
    rung = menu.move_seconds(state.current, np.array([0.0, 1.0, 2.0]))[np.arange(len(index)), index].astype(int)
    state.seconds += np.where(moved, state.runs.move_seconds[np.arange(len(index)), rung], 0.0)
    np.add.at(state.moves, (np.flatnonzero(moved), rung[moved]), 1)


def _speed(state: _State, walk: Floats | None, number: int) -> Floats | None:
    """Logarithm of how much faster each layout is now than at the start, shape (R, layouts); None if nothing drifts."""
    if walk is None:
        return None
    machine = walk[state.row, number % DRAWS]
    runs = state.runs
    if runs.bursts:
        draws = [np.random.default_rng([seed, 3, number]).random() for seed in runs.seed.tolist()]
        machine = machine - np.log(2) * (np.array(draws) < runs.bursts)[:, None]
    return np.asarray(machine)


def _allowance(state: _State) -> Floats:
    """Seconds that trials may take now, shape (R,)."""
    if np.isinf(state.runs.trial_budget):
        return np.full(len(state.row), np.inf)
    return np.maximum(state.runs.trial_budget * state.seconds - state.spent, 0.0)


def _try(
    menu: Menu, state: _State, choice: Choice, situation: Situation, machine: Floats | None, objective: Objective
) -> Indices:
    """Make the trials that were asked for: there, a few steps, and back unless it was better; what runs then.

    The comparison is beside what ran, so the machine is not in it. The progress of the steps is that of the candidate.
    """
    assert choice.exploring is not None
    assert state.live is not None
    index, runs = choice.index.copy(), state.runs
    worth = situation.goodput(situation.critical_batch) / situation.samples_per_second
    for row in np.flatnonzero(choice.exploring):
        candidate, running = int(index[row]), int(state.current[row])
        rates = state.actual[row].copy()
        if machine is not None:
            rates = rates * np.exp(machine[row, menu.layout])
        ratio = float(
            np.log(menu.global_batch[candidate] / menu.global_batch[running] / rates[candidate] * rates[running])
        )
        seen = ratio + TRIAL_ERROR * float(np.random.default_rng([int(runs.seed[row]), 4, situation.number]).normal())
        table = state.table
        step = menu.global_batch / table
        off = seen - float(np.log(step[candidate] / step[running]))
        configurations = menu.configurations[candidate], menu.configurations[running]
        own = float(state.table_error[candidate]), float(state.table_error[running])
        state.live[row].observe_comparison(*configurations, off, TRIAL_ERROR, own, 5)
        state.unseen[row, menu.passes == menu.passes[candidate]] = False
        useful = np.log(menu.global_batch[candidate] * worth[row, candidate])
        useful -= np.log(menu.global_batch[running] * worth[row, running])
        stays = seen < useful - 2 * TRIAL_ERROR
        move = float(menu.move_seconds(np.array([running]), runs.move_seconds[row])[0, candidate])
        steps = SETTLING_STEPS + EXPECTED_STEPS
        seconds = steps * menu.global_batch[candidate] / rates[candidate]
        phi = float(_read(runs.critical_batch[row : row + 1], state.progress[row : row + 1])[0])
        made = progress_per_sample(menu.global_batch[candidate], phi, objective) * steps * menu.global_batch[candidate]
        state.progress[row] += min(float(made) / float(runs.progress[row]), 1 - state.progress[row])
        state.samples[row] += steps * menu.global_batch[candidate]
        state.seconds[row] += seconds + (0.0 if stays else 2 * move)
        state.spent[row] += seconds + 2 * move + steps * menu.global_batch[running] / rates[running]
        state.trials[row] += 1
        if not stays:
            index[row] = running
    return index


def _learn_factor(menu: Menu, state: _State, index: Indices, true_phi: Floats) -> None:
    """What a change of batch teaches of c, by the slopes of the loss before and after it
    (`planner.critical_batch_factor`): the ratio of the slopes is known as well as the noise of the loss of all
    sequences on both sides allows."""
    before, after = menu.global_batch[state.current], menu.global_batch[index]
    changed = before != after
    stretch = np.minimum(NEAR * state.samples, state.samples - state.changed_at)
    told = changed & (stretch > 0) & (state.shift_error > 0)
    if told.any():
        fall = LOSS_SLOPE * stretch / np.maximum(state.samples, 1)  # nats over the stretch
        slope_error = 4 * np.sqrt(12 / np.maximum(stretch, 1)) * LOSS_NOISE / np.maximum(fall, 1e-9)
        sensitivity = np.abs(after / (true_phi + after) - before / (true_phi + before))
        error = np.hypot(slope_error * np.sqrt(2) / np.maximum(sensitivity, 1e-9), SYSTEMATIC)
        draws = [
            np.random.default_rng([seed, 5, int(at)]).normal()
            for seed, at in zip(state.runs.seed, state.samples, strict=True)
        ]
        seen = -np.log(state.runs.factor_error) + error * np.array(draws)
        gain = np.where(told, state.shift_error**2 / (state.shift_error**2 + error**2), 0.0)
        state.shift = state.shift + gain * (seen - state.shift)
        state.shift_error = state.shift_error * np.sqrt(1 - gain)
    state.changed_at = np.where(changed, state.samples, state.changed_at)


def _advance(
    menu: Menu, state: _State, machine: Floats | None, objective: Objective, number: int, draws: Floats
) -> np.ndarray:
    """Train to the next decision, or to the target; which runs reached it."""
    runs, rows = state.runs, np.arange(len(state.current))
    batch = menu.global_batch[state.current]
    length = KNOWN_STEPS * batch if number == 0 and runs.first_guess is not None else _to_next(menu, state)
    rate = state.actual[rows, state.current]
    if machine is not None:
        rate = rate * np.exp(machine[rows, menu.layout[state.current]])
    left = 1 - state.progress
    step = np.zeros_like(left)
    for _ in range(3):  # Simpson's rule, solved by iteration: φ changes little within a step
        phi, inverse = np.zeros_like(left), np.zeros_like(left)
        for place, weight in ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)):
            here = _read(runs.critical_batch, state.progress + place * np.minimum(step, left))
            phi = phi + weight * here
            inverse = inverse + weight / progress_per_sample(batch, here, objective)
        step = length / (inverse * runs.progress)
    finished = step >= left
    samples = np.where(finished, left * runs.progress * inverse, length)
    if runs.first_guess is not None:
        early = 1.0 if runs.early_error is None else runs.early_error ** np.exp(-(state.progress + step / 2) / EARLY)
        ends = state.samples, state.samples + length
        state.meter.observe(phi * runs.factor_error * early, *ends, batch, runs.planned_samples, draws)
    state.progress = state.progress + np.minimum(step, left)
    state.samples = state.samples + samples
    state.seconds = state.seconds + samples / rate
    state.unseen[rows, state.current] = False
    if state.live is not None:
        _learn(menu, state, rate, samples / batch)
    return np.asarray(finished)


def _learn(menu: Menu, state: _State, rate: Floats, steps: Floats) -> None:
    """Correct what each run believes of throughputs by the steps that it made, at samples a second of `rate`."""
    assert state.live is not None
    own = state.table_error
    for row, (live, current, seen, count) in enumerate(zip(state.live, state.current, rate, steps, strict=True)):
        running, error = menu.configurations[current], float(own[current])
        live.observe(running, 1 / state.table[current], 1 / seen, error, max(float(count), 1.0))
        for index, configuration in enumerate(menu.configurations):
            state.believed[row, index] = state.table[index] / live.factor(configuration)
            beside = live.error(configuration, float(own[index]), running, error) if index != current else 0.0
            state.error[row, index] = beside


def _read(grid: Floats, progress: Floats) -> Floats:
    """Values at some progress of each row, in straight lines between the points."""
    place = np.clip(progress, 0.0, 1.0) * (grid.shape[1] - 1)
    low = np.minimum(place.astype(np.int64), grid.shape[1] - 2)
    rows = np.arange(len(grid))
    return np.asarray(grid[rows, low] + (place - low) * (grid[rows, low + 1] - grid[rows, low]))
