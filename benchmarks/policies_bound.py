"""What could any rule do that is not told by how much c is wrong? Linear programmes, on measured throughput.

    python -m benchmarks.policies_bound --data DIR [--quick] [--json]

A rule sees c·φ. Whether φ is that, half of it or twice as much, looks the same to it, so one schedule has to serve all
three. Here a schedule may even know all of c·φ to come, move for nothing, and split its time between configurations:
nothing that decides while the job runs can do better. For every table and every c·φ of `benchmarks.policies` (three
ranges, c right, half and twice) the best such schedules are found

- that are at worst so much slower than the best fixed configuration, whichever φ it is;
- that are at least as good as COPUS's rule of 10 %, whichever φ it is.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import linprog

from benchmarks.command import console_of, parser_of, tell
from benchmarks.policies import CALIBRATIONS, RANGES, read_tables
from planner.goodput import progress_per_sample
from planner.menu import Floats, Menu
from planner.simulator.trajectory import POINTS, geometric

STRETCHES = 64
"""Equal shares of the progress, in each of which φ is taken to be constant."""
HARM = 0.5
"""Percent that a schedule may be slower than the best fixed configuration."""
TRUE = np.array([0.5, 1.0, 2.0])
"""True φ over what it is believed to be: c twice too large, right, half of what it is."""


@dataclass(frozen=True)
class Game:
    """One table and one c·φ."""

    seconds: Floats
    """For each φ that it could be, each stretch and each configuration, over those that the best fixed configuration
    takes for the whole: shape (3, K, C)."""
    greedy: Floats
    """Share of each stretch in each configuration, by the best Goodput: shape (K, C)."""
    copus: Floats
    """The same by COPUS's rule."""

    @classmethod
    def of(cls, menu: Menu, speed: Floats, believed: Floats) -> "Game":
        """`believed` is c·φ at the middles of the stretches, shape (K,)."""
        phi = TRUE[:, None] * believed
        seconds = 1 / (speed * progress_per_sample(menu.global_batch, phi[..., None]))
        seconds /= seconds.sum(axis=1).min(axis=1)[:, None, None]
        goodput = speed * progress_per_sample(menu.global_batch, believed[:, None])
        best = goodput.argmax(axis=1)
        here, kept = int(best[0]), []
        for k, index in enumerate(best.tolist()):
            if goodput[k, index] >= 1.1 * goodput[k, here]:
                here = index
            kept.append(here)
        share = np.eye(len(menu))
        return cls(seconds, share[best], share[np.array(kept)])

    def gains(self, share: Floats) -> Floats:
        """Over the best fixed configuration, in percent, for each φ that it could be: shape (3,)."""
        return np.asarray(100 * (1 / (self.seconds * share).sum(axis=(1, 2)) - 1))

    def best(self, weights: Floats, least: Floats) -> Floats | None:
        """Gains of the schedule with the least weighted time whose gains are at least `least` (percent), shape (3,);
        None if there is none."""
        times = self.seconds.reshape(len(TRUE), -1)
        stretches, size = self.seconds.shape[1:]
        whole = np.kron(np.eye(stretches), np.ones(size))
        solution = linprog(
            weights @ times, times, 1 / (1 + least / 100), whole, np.ones(stretches), bounds=(0, None), method="highs"
        )
        return self.gains(solution.x.reshape(stretches, size)) if solution.success else None


def measure(tables: dict[str, tuple[Menu, Floats]]) -> dict[str, Any]:
    """Means and worst cells, by what is asked of a schedule."""
    right, off = np.array([0.0, 1.0, 0.0]), np.array([0.5, 0.0, 0.5])
    slack = 1e-6  # of the solver
    gains_of: dict[str, list[Floats | None]] = {}
    middles = np.interp((np.arange(STRETCHES) + 0.5) / STRETCHES, np.linspace(0, 1, POINTS), np.arange(POINTS))
    for menu, speed in tables.values():
        for first, last in RANGES:
            for factor in CALIBRATIONS:
                whole = geometric(first * factor, last * factor)
                game = Game.of(menu, speed, np.exp(np.interp(middles, np.arange(POINTS), np.log(whole))))
                copus, harm = game.gains(game.copus), np.full(3, -HARM)
                answers = {
                    "goodput, φ known but for c": game.gains(game.greedy),
                    "copus, φ known but for c": copus,
                    "at most 0.5 % slower than fixed, best for c right": game.best(right, harm),
                    "at most 0.5 % slower than fixed, best for c off": game.best(off, harm),
                    "never behind copus, best for c right": game.best(right, copus - slack),
                    "never behind copus, best for c off": game.best(off, copus - slack),
                    "both": game.best(right, np.maximum(copus, -HARM) - slack),
                }
                for name, gains in answers.items():
                    gains_of.setdefault(name, []).append(gains)
    return {name: _figures(gains) for name, gains in gains_of.items()}


def _figures(gains: list[Floats | None]) -> dict[str, Any]:
    there = np.array([gain for gain in gains if gain is not None]).reshape(-1, 3)
    if not len(there):
        return {"cases": len(gains), "possible": 0, "mean_gain_pct": None, "worst_gain_pct": None}
    return {
        "cases": len(gains),
        "possible": len(there),
        "mean_gain_pct": dict(zip(("c ×2", "c right", "c ×0.5"), there.mean(axis=0).tolist(), strict=True)),
        "worst_gain_pct": float(there.min()),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """A table for people."""
    table = Table("schedules", "possible in", "c ×½", "c right", "c ×2", "worst", title="gain over the best fixed, %")
    for name, line in result["schedules"].items():
        figures = ["–"] * 4
        if line["possible"]:
            figures = [f"{line['mean_gain_pct'][c]:.2f}" for c in ("c ×0.5", "c right", "c ×2")]
            figures.append(f"{line['worst_gain_pct']:.2f}")
        table.add_row(name, f"{line['possible']} of {line['cases']}", *figures)
    console.print(table)
    console.print("means over the cases where it is possible; moves cost nothing, and all of c·φ is known beforehand")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("policies_bound", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with throughput.csv")
    parser.add_argument("--quick", action="store_true", help="every fifth table")
    options = parser.parse_args(arguments)
    if not (options.data / "throughput.csv").is_file():
        parser.error(f"--data: {options.data / 'throughput.csv'} is not there")
    tables = read_tables(options.data / "throughput.csv")
    if options.quick:
        tables = dict(list(tables.items())[::5])
    result = {"benchmark": "policies_bound", "quick": options.quick, "harm_pct": HARM, "schedules": measure(tables)}
    tell(result, show, options, console_of(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
