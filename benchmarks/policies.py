"""How near does each policy come to somebody who knows the future? Simulated, on measured throughput.

    python -m benchmarks.policies --data DIR [--quick] [--json] [--seeds N] [--steps N] [--shape SHAPE]

DIR has `throughput.csv`. Every sweep of the source `vtrain-single` is a table: of each layout and global batch the
fastest row. A cell is a table, a range that φ grows through, a cost of moving to another layout and an error of c; in
every cell every policy trains to the same target with the same seeds. Then the four set-ups of the COPUS paper, on
predicted throughput.
"""

import argparse
import csv
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.policies_report import print_cells, print_summary, summary
from benchmarks.policies_setups import measure_setups, print_setups
from planner.menu import Menu
from planner.plan import Plan
from planner.policies.cbs import CriticalBatch
from planner.policies.goodput import Goodput
from planner.policies.norm_test import NormTest
from planner.policies.policy import Copus, Policy, Static
from planner.policies.schedules import Ramp
from planner.simulator.runs import Runs
from planner.simulator.simulate import best_fixed_seconds, oracle, simulate
from planner.simulator.trajectory import POINTS, geometric, linear, power
from profiles.configuration import Configuration
from profiles.layout import Layout

SOURCE = "vtrain-single"
RANGES = ((2, 64), (4, 256), (8, 1024))
MOVE_STEPS = (0, 30, 300)
CALIBRATIONS = (1.0, 0.5, 2.0)
NOISE = 0.3
DRIFTING_RANGE = (4, 256)
DECISIONS = 200
LEARNED_RANGE = 2.6
"""90 % interval of c, as a factor either way, where the run learns it from its changes of batch."""
DRIFTING: dict[str, Any] = {"drift": 0.2, "bursts": 0.1, "throughput_error": 0.15, "trial_budget": 0.02}
"""A machine that is shared: its speed wanders, for a tenth of the time it is half, tables are off by 15 %, and trials
find that out. Deciding there is dear to simulate: with one range, and c right."""
BLIND_SPREAD = 1.0
"""Standard deviation of the logarithm of what laws say of φ over what it is, before the first step of a blind start."""
COMPARED = {
    ("still", True): ("goodput",),
    ("blind", True): ("goodput", "copus"),
    ("drifting", False): ("goodput", "copus", "static"),
}
"""Policies that are simulated beyond a still world with a c that is taken for exact: only these learn c, or are worth
the time. All are simulated there."""
SHAPES = {"geometric": geometric, "linear": linear, "power": power}


@dataclass(frozen=True)
class Cell:
    """One set of circumstances."""

    table: str
    first: float
    last: float
    move_steps: int
    calibration: float
    calibration_learned: bool
    """Whether c is a prior that the run learns from, or what it is."""
    world: str
    """`still`; `drifting`: see `DRIFTING`; or `blind`: as a job begins, from what laws say of φ, and with a noise scale
    that is an average over the steps so far."""
    plan: Plan
    """What the oracle does, and the best fixed configuration."""
    runs: Runs
    """One run a seed."""


def policies(menu: Menu) -> dict[str, Policy]:
    """Everything that is compared."""
    smallest = int(menu.global_batch.min())
    return {
        "static": Static(),
        "ramp": Ramp(smallest, smallest, None),
        "norm-test paper": NormTest("paper", 0.5, 1),
        "norm-test unbiased": NormTest("unbiased", 0.5, 1),
        "cbs pessimistic": CriticalBatch("pessimistic"),
        "cbs optimistic": CriticalBatch("optimistic"),
        "copus": Copus(0.10),
        "goodput": Goodput(),
    }


def read_tables(file: Path) -> dict[str, tuple[Menu, np.ndarray]]:
    """For every sweep of the source the fastest row of each layout and global batch, as samples a second."""
    best: defaultdict[str, dict[tuple[Layout, int], tuple[float, Configuration]]] = defaultdict(dict)
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["source_id"] != SOURCE or not row["step_time_s"]:
                continue
            layout = Layout(
                tp=int(row["tp"]), pp=int(row["pp"]), dp=int(row["dp"]), recompute=row["recompute"] or "none"
            )
            configuration = Configuration(layout=layout, micro_batch=int(row["mbs"]), global_batch=int(row["gbs"]))
            key, seconds = (layout, configuration.global_batch), float(row["step_time_s"])
            if key not in best[row["sweep_id"]] or seconds < best[row["sweep_id"]][key][0]:
                best[row["sweep_id"]][key] = (seconds, configuration)
    tables = {}
    for sweep, rows in best.items():
        menu = Menu.of([configuration for _, configuration in rows.values()])
        tables[sweep] = (menu, menu.global_batch / np.array([seconds for seconds, _ in rows.values()]))
    return tables


def make_cells(table: str, menu: Menu, speed: np.ndarray, args: argparse.Namespace) -> list[Cell]:
    """Every cell of a table, and what the oracle does in it."""
    cells = []
    for first, last in RANGES:
        phi = SHAPES[args.shape](first, last)
        fixed = oracle(menu, speed, phi, 1.0, np.zeros(3))
        batch = menu.global_batch[fixed.fixed_index]
        progress = args.steps * batch / fixed.fixed_samples  # so that the best fixed configuration takes so many steps
        samples = args.steps * batch
        step_seconds = batch / speed[fixed.fixed_index]
        for steps in MOVE_STEPS:
            rungs = np.array([steps if args.every_move_pays else 0, steps if args.every_move_pays else 0, steps])
            plan = oracle(menu, speed, phi, progress, rungs * step_seconds)
            circumstances = [(c, learned, "still") for learned in (False, True) for c in CALIBRATIONS]
            circumstances += [(c, True, "blind") for c in CALIBRATIONS]
            if (first, last) == DRIFTING_RANGE:
                circumstances.append((1.0, False, "drifting"))
            for calibration, learned, world in circumstances:
                n = args.seeds
                runs = Runs(
                    critical_batch=np.broadcast_to(phi, (n, POINTS)),
                    progress=np.full(n, progress),
                    planned_samples=np.full(n, float(samples)),
                    every_samples=np.full(n, samples / DECISIONS),
                    move_seconds=np.broadcast_to(rungs * step_seconds, (n, 3)),
                    seed=np.arange(n),
                    noise=np.full(n, args.noise),
                    factor_error=np.full(n, calibration),
                    correlation=args.correlation,
                    factor_range=LEARNED_RANGE if learned else 1.0,
                    first_guess=_first_guesses(n) if world == "blind" else None,
                    **(DRIFTING if world == "drifting" else {}),
                )
                cells.append(Cell(table, first, last, steps, calibration, learned, world, plan, runs))
    return cells


def _first_guesses(seeds: int) -> np.ndarray:
    """What laws say of φ over what it is, one factor a seed."""
    return np.exp([BLIND_SPREAD * np.random.default_rng([seed, 6]).normal() for seed in range(seeds)])


def _joined(cells: Sequence[Cell]) -> Runs:
    """The runs of all cells at once: arrays are long, so that the interpreter does little."""
    first = cells[0].runs
    arrays = [name for name, value in vars(first).items() if isinstance(value, np.ndarray)]
    joined = {name: np.concatenate([getattr(cell.runs, name) for cell in cells]) for name in arrays}
    return Runs(**{**vars(first), **joined})


def measure(tables: dict[str, tuple[Menu, np.ndarray]], args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Figures of every cell and policy, and how many runs were simulated."""
    figures, count = [], 0
    for table, (menu, speed) in tables.items():
        everything = make_cells(table, menu, speed, args)
        for key in {(cell.world, cell.calibration_learned): None for cell in everything}:
            cells = [cell for cell in everything if (cell.world, cell.calibration_learned) == key]
            joined = _joined(cells)
            fixed = _best_fixed_seconds(menu, speed, cells, joined)
            for name, policy in policies(menu).items():
                if args.only and name not in args.only:
                    continue
                if name not in COMPARED.get(key, (name,)):
                    continue
                outcome = simulate(menu, speed, joined, policy)
                count += len(joined.seed)
                for cell, rows in zip(cells, np.split(np.arange(len(joined.seed)), len(cells)), strict=True):
                    figures.append(_figures(cell, name, menu, outcome.seconds[rows], outcome.moves[rows], fixed[rows]))
            if not args.only and key == ("still", False):
                for cell in cells:
                    own = np.full(1, cell.plan.seconds), np.zeros((1, 3)), np.full(1, cell.plan.fixed_seconds)
                    figures.append(_figures(cell, "oracle", menu, *own))
    return figures, count


def _best_fixed_seconds(menu: Menu, speed: np.ndarray, cells: Sequence[Cell], joined: Runs) -> np.ndarray:
    """Time that the best fixed configuration takes in each run, shape (R,): as planned, but for a machine that drifts,
    on which all are run, and hindsight takes the fastest in that run."""
    seeds = len(joined.seed) // len(cells)
    if cells[0].world != "drifting":
        return np.repeat([cell.plan.fixed_seconds for cell in cells], seeds)
    return best_fixed_seconds(menu, speed, joined)


def _figures(
    cell: Cell, policy: str, menu: Menu, seconds: np.ndarray, moves: np.ndarray, fixed: np.ndarray
) -> dict[str, Any]:
    gains = fixed / seconds - 1
    mean = float(gains.mean())
    half = 1.645 * float(gains.std(ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return {
        "table": cell.table,
        "batches": len(set(menu.global_batch.tolist())),
        "noise_from": cell.first,
        "noise_to": cell.last,
        "move_cost_steps": cell.move_steps,
        "calibration": cell.calibration,
        "calibration_learned": cell.calibration_learned,
        "world": cell.world,
        "policy": policy,
        "seeds": len(seconds),
        "seconds": float(seconds.mean()),
        "ratio_to_oracle": float(seconds.mean() / cell.plan.seconds),
        "worst_ratio_to_oracle": float(seconds.max() / cell.plan.seconds),
        "gain_over_best_fixed_pct": 100 * mean,
        "low": 100 * (mean - half),
        "high": 100 * (mean + half),
        "worst_seed_pct": 100 * float(gains.min()),
        "layout_moves": float(moves[:, 2].mean()),
        "batch_moves": float(moves[:, :2].sum(axis=1).mean()),
        "best_fixed": menu.configurations[cell.plan.fixed_index].label,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run it; 2 where there is no data."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with throughput.csv")
    parser.add_argument("--quick", action="store_true", help="4 seeds")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--seeds", type=int, default=0, help="runs of each cell (16)")
    parser.add_argument(
        "--steps", type=int, default=100_000, help="length of the job, in steps of the best fixed batch"
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="geometric", help="how φ grows over the progress")
    parser.add_argument("--noise", type=float, default=NOISE, help="standard deviation of log φ in one estimate")
    parser.add_argument("--correlation", type=float, default=0.0, help="of errors of successive estimates")
    parser.add_argument("--every-move-pays", action="store_true", help="a new batch costs as much as a new layout")
    parser.add_argument("--only", nargs="*", default=[], help="policies to run")
    args = parser.parse_args(arguments)
    args.seeds = args.seeds or (4 if args.quick else 16)
    file = args.data / "throughput.csv"
    if not file.is_file():
        print(f"benchmarks.policies: {file}: no such file", file=sys.stderr)
        return 2
    tables = read_tables(file)
    if not tables:
        print(f"benchmarks.policies: {file}: no rows of the source {SOURCE}", file=sys.stderr)
        return 2
    started = time.process_time()
    cells, count = measure(tables, args)
    spent = time.process_time() - started
    settings = {
        "steps": args.steps,
        "decisions": DECISIONS,
        "noise": args.noise,
        "shape": args.shape,
        "correlation": args.correlation,
        "seeds": args.seeds,
        "every_move_pays": args.every_move_pays,
    }
    result: dict[str, Any] = {
        "settings": settings,
        "cells": cells,
        "summary": summary(cells),
        "simulated_runs": count,
        "cpu_seconds": spent,
        "runs_per_minute": 60 * count / spent,
        "setups": [] if args.only else measure_setups(args.seeds, args.noise),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print_cells([cell for cell in cells if cell["world"] == "still" and not cell["calibration_learned"]])
        print_summary(result)
        print_setups(result["setups"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
