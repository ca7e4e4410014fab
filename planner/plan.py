"""A whole run planned at once: dynamic programming over progress × configurations."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.goodput import Objective, progress_per_sample
from planner.menu import Floats, Indices, Menu


@dataclass(frozen=True)
class Stretch:
    """A part of the plan in one configuration."""

    first: float
    """Progress at which it begins, as a share of the run."""
    last: float
    """Progress at which it ends."""
    index: int
    """Its configuration, in the menu."""
    critical_batch: float
    """φ at the beginning, sequences."""
    seconds: float
    """Time that it takes, the move to it included."""


@dataclass(frozen=True)
class Plan:
    """The fastest way through a run for a known φ, and the best that one configuration could do."""

    schedule: tuple[Stretch, ...]
    """What runs when."""
    seconds: float
    """Duration of the run, moves included."""
    fixed_index: int
    """The configuration that is fastest when nothing ever changes."""
    fixed_seconds: float
    """Duration of the run in it."""
    fixed_samples: float
    """Sequences that it takes in it."""
    samples: float
    """Sequences that the plan takes."""

    @property
    def gain(self) -> float:
        """How much longer the best fixed configuration takes: what adapting is worth."""
        return self.fixed_seconds / self.seconds - 1


def seconds_to_go(stages: Floats, menu: Menu, rungs: Floats) -> Iterator[Floats]:
    """Bellman's recursion, backwards: for each stage, last first, the seconds to the end from the start of the stage
    in each configuration, when from the next stage on the best is done.

        V_k(j) = t_k(j) + min over j' of [cost(j → j') + V_{k+1}(j')],   V_K = 0

    `stages` are the durations t_k(j), shape (K, …, C); `rungs` the costs of moves, shape (3,) or (…, 3).
    """
    value = np.zeros(stages.shape[1:])
    for k in range(len(stages) - 1, -1, -1):
        value = stages[k] + (value if k == len(stages) - 1 else menu.cheapest(value, rungs))
        yield value


def plan_run(
    menu: Menu,
    samples_per_second: Floats,
    critical_batch: Floats,
    progress: float,
    rungs: Floats,
    objective: Objective = "plain",
    start: int | None = None,
) -> Plan:
    """The fastest schedule for φ given at the middles of K equal shares of the progress.

    `progress` is the length of the run in effective samples (samples × efficiency; × √B for the lr-aware form): what a
    run at a tiny batch would take. `samples_per_second` has the shape (C,), `critical_batch` (K,). Without `start` the
    first configuration costs nothing.
    """
    share = progress / len(critical_batch)
    samples = share / progress_per_sample(menu.global_batch, np.asarray(critical_batch)[:, None], objective)
    stages = samples / samples_per_second
    values = list(seconds_to_go(stages, menu, rungs))[::-1]
    entry = np.zeros(len(menu)) if start is None else menu.move_seconds(np.array([start]), rungs)[0]
    index = int(np.argmin(entry + values[0]))
    seconds = float(entry[index] + values[0][index])
    path, spent = [index], [float(entry[index] + stages[0][index])]
    for k in range(1, len(stages)):
        costs = menu.move_seconds(np.array([path[-1]]), rungs)[0]
        total = costs + values[k]
        # Staying wins ties: a move that gains nothing is not made.
        best = path[-1] if total[path[-1]] <= total.min() * (1 + 1e-12) else int(np.argmin(total))
        path.append(best)
        spent.append(float(costs[best] + stages[k][best]))
    fixed = stages.sum(axis=0)
    fixed_index = int(np.argmin(fixed))
    return Plan(
        schedule=_stretches(np.array(path), np.array(spent), np.asarray(critical_batch)),
        seconds=seconds,
        fixed_index=fixed_index,
        fixed_seconds=float(fixed[fixed_index]),
        fixed_samples=float(samples[:, fixed_index].sum()),
        samples=float(samples[np.arange(len(path)), path].sum()),
    )


def _stretches(path: Indices, spent: Floats, critical_batch: Floats) -> tuple[Stretch, ...]:
    """Equal neighbours as one."""
    ends = [*(np.flatnonzero(np.diff(path)) + 1).tolist(), len(path)]
    starts = [0, *ends[:-1]]
    return tuple(
        Stretch(a / len(path), b / len(path), int(path[a]), float(critical_batch[a]), float(spent[a:b].sum()))
        for a, b in zip(starts, ends, strict=True)
    )
