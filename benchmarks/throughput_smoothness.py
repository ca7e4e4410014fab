"""Where `profiles.cost.residual.Smoothness` comes from, and how well fits do on a source that had no say in any of it.

    python -m benchmarks.throughput_smoothness --data DIR [--without PREFIX] [--json]

The sizes and lengths of misses that make the published sweeps with at least 8 reliable rows most probable (multivariate
Student, linearized at the most probable constants; a source weighs the square root of its sweeps). `--without vtrain`
leaves sources out whose name starts so, tunes the prior means without them too (`benchmarks.throughput_priors`), and
then scores `benchmarks.throughput` on them. Takes about a minute.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy.linalg import solve_triangular
from scipy.optimize import least_squares, minimize

from benchmarks import throughput
from benchmarks.command import console_of, parser_of, tell
from benchmarks.published import Published, Sweep, read
from benchmarks.throughput_intervals import NO_EFFECTS, blind_spreads
from benchmarks.throughput_priors import Tuner
from profiles.accelerator import accelerator
from profiles.cost.constants import NAMES, prior
from profiles.cost.effects import Effects
from profiles.cost.model import jacobian
from profiles.cost.residual import Smoothness, coordinates, covariance
from profiles.cost.step_time import step_seconds
from profiles.cost.work import Work, work

GUESSES = {
    **{"shape_sd": 0.06, "shape_length": 1.0, "layout_sd": 0.06, "microbatch_sd": 0.05, "step_sd": 0.02},
    **{"noise_sd": 0.02, "degree_length": 2.0, "batch_length": 1.5, "flag_length": 2.0},
}
"""Medians of priors, one doubling wide."""
LEAST_NOISE = 0.02
"""Repeats differ by more in every source that has some, whatever the likelihood of single rows says."""
LEAST_ROWS, MOST_ROWS = 8, 40

Floats = NDArray[np.float64]


class _Rows:
    """Reliable rows of a sweep, at most `MOST_ROWS` of them."""

    def __init__(self, sweep: Sweep, rng: np.random.Generator, effects: Effects | None) -> None:
        t = sweep.timings.take(sweep.scored)
        if len(t.step_seconds) > MOST_ROWS:
            t = t.take(np.sort(rng.choice(len(t.step_seconds), MOST_ROWS, replace=False)))
        device = accelerator(t.cluster.accelerator)
        self.source = sweep.source_id
        self.logs = np.log(t.step_seconds)
        self.places = coordinates(t.model, t.cluster, t.configurations)
        self._mean, self._sd = prior(device, sweep.stack, t.precision, effects, sweep.features)
        self._work: Work = work(t.model, t.cluster, device, t.configurations, t.precision, dispatch=sweep.dispatch)

    def linear(self, how: Smoothness) -> tuple[Floats, Floats]:
        """Covariance that the constants' priors cause, and distance from the priors' expectation."""
        lower = np.linalg.cholesky(_noisy(self.places, how))

        def off(z: Floats) -> Floats:
            return self.logs - np.log(step_seconds(self._work, self._mean + self._sd * z))

        def misses(z: Floats) -> Floats:
            return np.concatenate([solve_triangular(lower, off(z), lower=True), z])

        z = least_squares(misses, np.zeros(len(NAMES)), loss="soft_l1", f_scale=3.0, max_nfev=30).x
        moves = jacobian(self._work, self._mean, self._sd, z)
        return moves @ moves.T, off(z) + moves @ z


def _noisy(places: Floats, how: Smoothness) -> Floats:
    return covariance(places, places, how) + how.noise_sd**2 * np.eye(len(places))


def smoothness(sweeps: list[Sweep], rounds: int = 2, effects: Effects | None = None) -> Smoothness:
    """The most probable one, where published runs say `effects` of the constants (None: those in use)."""
    rng = np.random.default_rng(1)
    rows = [_Rows(sweep, rng, effects) for sweep in sweeps if sweep.scored.sum() >= LEAST_ROWS]
    counted = Counter(row.source for row in rows)
    weights = [counted[row.source] ** -0.5 for row in rows]
    how = Smoothness()
    for _ in range(rounds):
        linear = [row.linear(how) for row in rows]
        arguments = ([row.places for row in rows], linear, weights)
        how = _named(minimize(_surprise, _GUESS, args=arguments, method="L-BFGS-B", options={"maxiter": 20}).x)
    return how._replace(noise_sd=max(how.noise_sd, LEAST_NOISE))


_GUESS = np.log(list(GUESSES.values()))


def _named(x: Floats) -> Smoothness:
    return Smoothness(**{name: float(value) for name, value in zip(GUESSES, np.exp(x), strict=True)})


def _surprise(x: Floats, places: list[Floats], linear: list[tuple[Floats, Floats]], weights: list[float]) -> float:
    """Minus the logarithm of the likelihood of all sweeps and of the priors."""
    how = _named(x)
    total = 0.5 * float((((x - _GUESS) / 0.7) ** 2).sum())
    for where, (caused, off), weight in zip(places, linear, weights, strict=True):
        lower = np.linalg.cholesky(caused + _noisy(where, how) + 1e-8 * np.eye(len(off)))
        whitened = solve_triangular(lower, off, lower=True)
        tail = 0.5 * (how.freedom + len(off)) * np.log1p(whitened @ whitened / how.freedom)
        total += weight * float(np.log(np.diag(lower)).sum() + tail)
    return total


def run(published: Published, without: str) -> dict[str, Any]:
    """Find it, and score what was left out."""
    apart = [bool(without) and sweep.source_id.startswith(without) for sweep in published.sweeps]
    used = [sweep for sweep, out in zip(published.sweeps, apart, strict=True) if not out]
    left = [sweep for sweep, out in zip(published.sweeps, apart, strict=True) if out]
    effects, others = None, NO_EFFECTS
    if left and used:  # what the left out sources had no say in
        effects, others = Tuner(used).tune(), throughput.without_each_family(used)
    how = smoothness(used, effects=effects)
    how = how._replace(**blind_spreads(used, how, others))
    lines = [line for sweep in left if (line := throughput.score(sweep, sweep.cost_model(effects, how)))]
    return {
        "benchmark": "throughput_smoothness",
        "without": without,
        "smoothness": how._asdict(),
        "left_out": {
            source: throughput.summary([line for line in lines if line["source_id"] == source])
            for source in dict.fromkeys(line["source_id"] for line in lines)
        },
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The sizes and lengths, and how well what was left out is predicted."""
    in_use = Smoothness()._asdict()
    console.print("\n".join(f"{name}: {v:.3g} (in use {in_use[name]:.3g})" for name, v in result["smoothness"].items()))
    for source, line in result["left_out"].items():
        if line["fitted_sweeps"]:
            regret = "" if line["regret_pct"] is None else f"regret {line['regret_pct']:.1f} %, "
            console.print(
                f"{source}, left out: MAPE {line['mape_pct']:.1f} %, {regret}coverage {line['coverage_pct']:.0f} %, "
                f"with no row {line['zero_shot_coverage_pct']:.0f} %, {line['mape_within_target']} of "
                f"{line['fitted_sweeps']} sweeps within the target"
            )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("throughput_smoothness", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with throughput.csv")
    parser.add_argument("--without", default="", help="sources to leave out and to score: how their names start")
    options = parser.parse_args(arguments)
    tell(run(read(options.data), options.without), show, options, console_of(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
