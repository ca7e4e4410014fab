"""What published runs say of the cost model's constants, and how well that does on sources that had no say in it.

    python -m benchmarks.throughput_priors --data DIR [--write] [--json]

From the guesses in `profiles/cost/constants.py` the medians are moved to where the errors of the published sweeps are
smallest, together with multipliers for each software stack, precision, accelerator and feature: random effects, which
stay near 1 where rows say little (`BETWEEN`). Every row counts with its rounded-off absolute logarithm, every sweep
with its mean, every source as the square root of its number of sweeps, and a guess or a multiplier as one standard
deviation of its prior. `--write` puts the result into `profiles/cost/effects.yaml`. The honest figure is the second
column of the table: tuned without the source, and without those that repeat its runs, then asked about it.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from benchmarks.command import console_of, parser_of, tell
from benchmarks.published import Sweep, read_all
from benchmarks.published_sources import family_of
from profiles.accelerator import accelerator
from profiles.cost.constants import CONSTANTS, NAMES, prior
from profiles.cost.effects import FILE, GROUPS, USUAL_PRECISION, Effect, Effects, precision_family
from profiles.cost.step_time import step_seconds
from profiles.cost.work import Work, work

BETWEEN = {
    "stack": {
        **{"products": 0.2, "tp_traffic": 0.5, "dp_traffic": 0.5, "congestion": 0.7, "stragglers": 0.5},
        **{"layer_launch_seconds": 0.8, "microbatch_launch_seconds": 0.7, "pipeline_launch_seconds": 1.0},
    },
    "precision": {"products": 0.1, "elementwise": 0.2},
    "accelerator": {"products": 0.08},
    "feature": {
        **{"products": 0.15, "elementwise": 0.3, "ep_traffic": 0.5},
        **{"layer_launch_seconds": 0.8, "expert_launch_seconds": 0.8, "microbatch_launch_seconds": 0.7},
    },
}
"""Constants that each group multiplies, and the standard deviation of the logarithms between its levels. Chosen, of a
few that were tried, by the errors on sources left out. The network of whoever published counts as part of the stack."""
ROUND = 0.1
"""Errors below this count less than in proportion."""
WEIGHT = 10.0
"""Of a source with one sweep, over a constant's prior."""

Floats = NDArray[np.float64]


class Multiplier(NamedTuple):
    """One of the unknowns beside the constants' medians."""

    group: str
    """Of `GROUPS`."""
    level: str
    """Of the group."""
    constant: int
    """Which constant it multiplies."""
    log_sd: float
    """Standard deviation of its logarithm, before any row."""
    rows: NDArray[np.bool_]
    """What it applies to."""


class Tuner:
    """All reliable rows at once."""

    def __init__(self, sweeps: list[Sweep]) -> None:
        self.sweeps = [sweep for sweep in sweeps if sweep.scored.any()]
        works, logs, offsets = [], [], []
        levels: list[tuple[tuple[str, ...], ...]] = []
        for sweep in self.sweeps:
            t = sweep.timings.take(sweep.scored)
            device, size = accelerator(t.cluster.accelerator), len(t.step_seconds)
            works.append(work(t.model, t.cluster, device, t.configurations, t.precision, dispatch=sweep.dispatch))
            logs.append(np.log(t.step_seconds))
            offsets.append(np.tile(prior(device, effects=Effects())[0], (size, 1)))
            stack: tuple[str, ...] = () if sweep.stack is None else (sweep.stack,)
            levels += [(stack, (precision_family(t.precision),), (device.name,), sweep.features)] * size
        self._work, self._logs, self._offsets = Work.concatenate(works), np.concatenate(logs), np.concatenate(offsets).T
        self._sizes = np.array([len(log) for log in logs])
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        self.families = np.array([family_of(sweep.source_id) for sweep in self.sweeps])
        counted = Counter(sweep.source_id for sweep in self.sweeps)
        self._weights = np.array([counted[sweep.source_id] ** -0.5 for sweep in self.sweeps]) / self._sizes
        self._base_sd = np.array([constant.log_sd for constant in CONSTANTS.values()])
        self._multipliers = [
            Multiplier(group, level, NAMES.index(name), sd, np.array([level in row[at] for row in levels]))
            for at, group in enumerate(GROUPS)
            for level in sorted({level for row in levels for level in row[at]} - {USUAL_PRECISION})
            for name, sd in BETWEEN[group].items()
        ]
        self._start = np.zeros(len(NAMES) + len(self._multipliers))
        self._start = self._solve(self._weights)[0]

    def tune(self, left_out: str | None = None) -> Effects:
        """What all rows say, or all but those of a family of sources (`benchmarks.published_sources.family_of`)."""
        used = np.where(self.families == left_out, 0.0, self._weights)
        best, jacobian = self._solve(used)
        sd = np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)))
        medians = {
            name: float(constant.mean * np.exp(width * z))
            for (name, constant), width, z in zip(CONSTANTS.items(), self._base_sd, best, strict=False)
        }
        weights = np.repeat(used, self._sizes)
        levels: dict[str, dict[str, dict[str, Effect]]] = {group: {} for group in GROUPS}
        for place, one in enumerate(self._multipliers, start=len(NAMES)):
            if weights[one.rows].any():
                effect = Effect(float(np.exp(one.log_sd * best[place])), float(one.log_sd * sd[place]))
                levels[one.group].setdefault(one.level, {})[NAMES[one.constant]] = effect
        return Effects(medians, BETWEEN, levels)

    def mapes(self, effects: Effects) -> Floats:
        """Mean absolute percentage error of each sweep."""
        absolute = []
        for sweep in self.sweeps:
            t = sweep.timings.take(sweep.scored)
            device = accelerator(t.cluster.accelerator)
            mean, _ = prior(device, sweep.stack, t.precision, effects, sweep.features)
            done = work(t.model, t.cluster, device, t.configurations, t.precision, dispatch=sweep.dispatch)
            absolute.append(100 * np.abs(step_seconds(done, mean) / t.step_seconds - 1).mean())
        return np.array(absolute)

    def _constants(self, z: Floats) -> Floats:
        """Logarithms of the constants of each row: constants × rows."""
        logs: Floats = self._offsets + (self._base_sd * z[: len(NAMES)])[:, None]
        for one, value in zip(self._multipliers, z[len(NAMES) :], strict=True):
            logs[one.constant] += one.log_sd * value * one.rows
        return logs

    def _solve(self, weights: Floats) -> tuple[Floats, Floats]:
        """The most probable unknowns, in standard deviations of their priors, and the Jacobian there."""
        of_rows = np.sqrt(WEIGHT * np.repeat(weights, self._sizes))

        def rounded(logs: Floats) -> Floats:
            errors = np.log(step_seconds(self._work, logs)) - self._logs
            size: Floats = np.sign(errors) * np.sqrt(2 * (np.sqrt(errors**2 + ROUND**2) - ROUND))
            return of_rows * size

        def misses(z: Floats) -> Floats:
            return np.concatenate([z, rounded(self._constants(z))])

        def jacobian(z: Floats) -> Floats:
            logs = self._constants(z)
            here, step, slopes = rounded(logs), 1e-4, np.empty((len(NAMES), len(of_rows)))
            for index in range(len(NAMES)):
                moved = logs.copy()
                moved[index] += step
                slopes[index] = (rounded(moved) - here) / step
            of_multipliers = [one.log_sd * slopes[one.constant] * one.rows for one in self._multipliers]
            return np.vstack([np.eye(len(z)), np.vstack([self._base_sd[:, None] * slopes, *of_multipliers]).T])

        found = least_squares(misses, self._start, jacobian, max_nfev=60, xtol=1e-3, ftol=1e-4)
        return found.x, found.jac


def run(folder: Path) -> tuple[dict[str, Any], Effects]:
    """Tune with everything, then without each family of sources."""
    tuner = Tuner(read_all(folder).sweeps)
    with_all = tuner.tune()
    inside, outside, rows = tuner.mapes(with_all), np.zeros(len(tuner.sweeps)), list[dict[str, Any]]()
    for family in dict.fromkeys(tuner.families.tolist()):
        own = tuner.families == family
        outside[own] = tuner.mapes(tuner.tune(family))[own]
    for source, kind in dict.fromkeys((sweep.source_id, sweep.kind) for sweep in tuner.sweeps):
        places = [i for i, sweep in enumerate(tuner.sweeps) if (sweep.source_id, sweep.kind) == (source, kind)]
        rows.append(
            {
                "source_id": source,
                "kind": kind,
                "rows": int(sum(tuner.sweeps[place].scored.sum() for place in places)),
                "sweeps": len(places),
                "zero_shot_mape_pct": float(inside[places].mean()),
                "left_out_mape_pct": float(outside[places].mean()),
                "left_out_within_25": int((outside[places] <= 25).sum()),
            }
        )
    result = {
        "benchmark": "throughput_priors",
        "means": dict(with_all.constants),
        "levels": {
            group: {level: {name: effect.multiplier for name, effect in of.items()} for level, of in levels.items()}
            for group, levels in with_all.levels.items()
        },
        "sources": rows,
        "left_out_within_25": sum(row["left_out_within_25"] for row in rows),
        "sweeps": sum(row["sweeps"] for row in rows),
    }
    return result, with_all


def write(effects: Effects, path: Path) -> None:
    """The effects as `profiles.cost.effects` reads them."""

    def short(value: float) -> float:
        return float(f"{value:.3g}")

    groups: dict[str, Any] = {"constants": {name: short(value) for name, value in effects.constants.items()}}
    for group in GROUPS:
        levels = {
            level: {name: [short(effect.multiplier), short(effect.log_sd)] for name, effect in constants.items()}
            for level, constants in effects.levels[group].items()
        }
        groups[group] = {"between": effects.between[group], **levels}
    lines = "# Written by `python -m benchmarks.throughput_priors --data DIR --write`: [multiplier, log_sd].\n"
    path.write_text(lines + yaml.safe_dump(groups, sort_keys=False, default_flow_style=None, width=120))


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    table = Table("constant", "guess", "tuned", *(f"multiplied by {group}" for group in GROUPS))
    for name, value in result["means"].items():
        by_group = (
            ", ".join(f"{level} {of[name]:.2f}" for level, of in result["levels"][group].items() if name in of)
            for group in GROUPS
        )
        table.add_row(name, f"{CONSTANTS[name].mean:.3g}", f"{value:.3g}", *by_group)
    console.print(table)
    table = Table("source", "kind", "rows", "sweeps", "MAPE %, tuned with it", "without it", "within 25 %")
    for row in result["sources"]:
        cells = (f"{row[key]:.1f}" for key in ("zero_shot_mape_pct", "left_out_mape_pct"))
        counts = (str(row["rows"]), str(row["sweeps"]))
        table.add_row(row["source_id"], row["kind"], *counts, *cells, str(row["left_out_within_25"]))
    console.print(table)
    console.print(f"left out, within 25 %: {result['left_out_within_25']} of {result['sweeps']} sweeps")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("throughput_priors", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with throughput.csv and the like")
    parser.add_argument("--write", action="store_true", help="put the result into profiles/cost/effects.yaml")
    options = parser.parse_args(arguments)
    result, effects = run(options.data)
    if options.write:
        write(effects, FILE)
    tell(result, show, options, console_of(options, width=200))
    return 0


if __name__ == "__main__":
    sys.exit(main())
