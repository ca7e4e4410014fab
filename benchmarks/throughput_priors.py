"""Where the cost model's prior means come from, and how well they do on a source that had no say in them.

    python -m benchmarks.throughput_priors --data DIR [--json]

From rounded guesses (`GUESS`), the means are moved to where the published sweeps' errors are smallest: every sweep
counts with its mean rounded-off absolute logarithm, every source as the square root of its number of sweeps, and a
guess as one standard deviation of its prior. The result, rounded, stands in `profiles/cost/constants.py`. The honest
figure is the second table: tuned without a source, then asked about it.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from benchmarks.command import console_of, parser_of, tell
from benchmarks.published import Sweep, read
from profiles.accelerator import accelerator
from profiles.cost.constants import CONSTANTS, NAMES, prior
from profiles.cost.step_time import step_seconds
from profiles.cost.work import Work, work

GUESS = {
    "products": 1.2,
    "half_speed_dimension": 600.0,
    "attention": 6.0,
    "elementwise": 1.0,
    "layer_launch_seconds": 1.0e-3,
    "pipeline_launch_seconds": 1.0e-4,
    "unbalance": 1.0,
    "microbatch_launch_seconds": 3.0e-3,
    "tp_traffic": 1.3,
    "tp_latency_seconds": 3.0e-5,
    "p2p_traffic": 2.0,
    "p2p_latency_seconds": 2.0e-4,
    "dp_traffic": 1.3,
    "shard_traffic": 1.5,
    "dp_latency_seconds": 1.0e-3,
    "dp_overlap": 0.75,
    "weights_overlap": 0.5,
    "gather_overlap": 0.7,
    "congestion": 0.1,
    "optimizer": 1.5,
    "step_seconds": 1.0e-2,
    "stragglers": 0.015,
    "company": 1.03,
    "time_scale": 1.0,
}
ROUND = 0.1
"""Errors below this count less than in proportion."""

Floats = NDArray[np.float64]


class Tuner:
    """All rows at once."""

    def __init__(self, sweeps: list[Sweep]) -> None:
        works, logs, offsets, self.sources = [], [], [], []
        guess = np.log([GUESS[name] for name in NAMES])
        usual = np.log([CONSTANTS[name].mean for name in NAMES])
        for sweep in sweeps:
            t = sweep.timings.take(sweep.scored)
            if not len(t.step_seconds):
                continue
            device = accelerator(t.cluster.accelerator)
            self.sources.append(sweep.source_id)
            works.append(work(t.model, t.cluster, device, t.configurations, t.precision))
            logs.append(np.log(t.step_seconds))
            # What an accelerator's file says stays.
            offsets.append(np.tile(guess + prior(device)[0] - usual, (len(t.step_seconds), 1)))
        self._work, self._logs, self._offsets = Work.concatenate(works), np.concatenate(logs), np.concatenate(offsets).T
        self._sizes = np.array([len(log) for log in logs])
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])

    def errors(self, shift: Floats) -> Floats:
        """Logarithm of predicted ÷ measured of every row."""
        return np.log(step_seconds(self._work, self._offsets + shift[:, None])) - self._logs

    def mean_by_sweep(self, values: Floats) -> Floats:
        """Mean of the rows of each sweep."""
        return np.add.reduceat(values, self._starts) / self._sizes

    def tune(self, left_out: str | None = None) -> Floats:
        """Logarithms of tuned ÷ guessed means."""
        counted = Counter(self.sources)
        weights = np.array([0.0 if source == left_out else counted[source] ** -0.5 for source in self.sources])
        sd = np.array([CONSTANTS[name].log_sd for name in NAMES])

        def misses(z: Floats) -> Floats:
            smooth = np.sqrt(self.errors(sd * z) ** 2 + ROUND**2) - ROUND
            return np.concatenate([z, np.sqrt(10 * weights * self.mean_by_sweep(smooth))])

        best: Floats = sd * least_squares(misses, np.zeros(len(NAMES)), max_nfev=30, diff_step=1e-4).x
        return best

    def mapes(self, shift: Floats) -> Floats:
        """Mean absolute percentage error of each sweep."""
        return 100 * self.mean_by_sweep(np.abs(np.expm1(self.errors(shift))))


def run(folder: Path) -> dict[str, Any]:
    """Tune with everything, then without each source."""
    tuner = Tuner(read(folder).sweeps)
    with_all = tuner.tune()
    rows = []
    for source in dict.fromkeys(tuner.sources):
        own = np.array([name == source for name in tuner.sources])
        inside, outside = tuner.mapes(with_all)[own], tuner.mapes(tuner.tune(source))[own]
        rows.append(
            {
                "source_id": source,
                "sweeps": len(inside),
                "zero_shot_mape_pct": float(np.mean(inside)),
                "left_out_mape_pct": float(np.mean(outside)),
                "left_out_within_25": int((outside <= 25).sum()),
            }
        )
    return {
        "benchmark": "throughput_priors",
        "means": {name: float(GUESS[name] * np.exp(shift)) for name, shift in zip(NAMES, with_all, strict=True)},
        "sources": rows,
        "left_out_within_25": sum(row["left_out_within_25"] for row in rows),
        "sweeps": sum(row["sweeps"] for row in rows),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    table = Table("constant", "guess", "tuned", "in use")
    for name, value in result["means"].items():
        table.add_row(name, f"{GUESS[name]:.3g}", f"{value:.3g}", f"{CONSTANTS[name].mean:.3g}")
    console.print(table)
    table = Table(
        "source", "sweeps", "MAPE %, tuned with it", "tuned without it", "within 25 %", title="no row measured"
    )
    for row in result["sources"]:
        cells = (f"{row[key]:.1f}" for key in ("zero_shot_mape_pct", "left_out_mape_pct"))
        table.add_row(row["source_id"], str(row["sweeps"]), *cells, str(row["left_out_within_25"]))
    console.print(table)
    console.print(f"left out, within 25 %: {result['left_out_within_25']} of {result['sweeps']} sweeps")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("throughput_priors", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with throughput.csv")
    options = parser.parse_args(arguments)
    result = run(options.data)
    tell(result, show, options, console_of(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
