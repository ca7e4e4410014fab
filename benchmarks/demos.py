"""The demo several times in a row, beside a neighbour that takes one core half of the time: does adapting pay?

    python -m benchmarks.demos [--runs N] [--neighbour busy|quiet] [--out DIR] [--json]

Every run is `make demo` with a throughput table of its own, so that none learns from the one before. The figures are
those of the run's own audit, and three statements about them can fail.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, copus_output, overrides_of, parser_of, set_arguments, tell
from benchmarks.neighbour_worker import busy_neighbour
from benchmarks.time_to_target import read_run

JOB = Path(__file__).resolve().parent.parent / "examples/shakespeare.yaml"
OUT = Path("build/demos")
MOST_MOVES = 10
MOST_TRIAL_PCT = 3.0


def run_all(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the demos one after another."""
    out = options.out.absolute() / time.strftime("%Y-%m-%d-%H%M%S")
    runs = []
    for number in range(1, options.runs + 1):
        settings = {"launch.runs": out, "name": f"demo-{number}", "profile.table": out / f"table-{number}.jsonl"}
        began = time.monotonic()
        with busy_neighbour(number) if options.neighbour == "busy" else nullcontext():
            said = copus_output("submit", str(JOB), "--json", *set_arguments(overrides_of(settings)))
        seconds = time.monotonic() - began
        audit = json.loads(copus_output("audit", json.loads(said)["run"], "--json"))
        runs.append(
            {
                "neighbour": options.neighbour,
                "command_seconds": seconds,
                **read_run(out / f"demo-{number}", None),
                "audit": audit,
            }
        )
        console.print(f"demo {number} of {options.runs}: {audit['moves']} moves, {seconds:.0f} s")
    return {"benchmark": "demos", "job": JOB.name, "runs": runs, "verdicts": verdicts(runs)}


def verdicts(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The statements, the worst figure of each, and whether it holds in every run."""
    moves = max(run["audit"]["moves"] for run in runs)
    trial_pct = max(100 * run["audit"]["trial_seconds"] / run["audit"]["training_seconds"] for run in runs)
    gains = [run["audit"]["gain_over_first_pct"] for run in runs]
    gain_pct = min(gain["value"] if gain else 0.0 for gain in gains)
    return [
        {"statement": f"at most {MOST_MOVES} moves", "worst": moves, "holds": moves <= MOST_MOVES},
        {
            "statement": f"at most {MOST_TRIAL_PCT:g} % of training in trials",
            "worst": trial_pct,
            "holds": trial_pct <= MOST_TRIAL_PCT,
        },
        {"statement": "a gain over the first configuration", "worst": gain_pct, "holds": gain_pct > 0},
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """A row for each run, then the verdicts."""
    table = Table("run", "tokens", "loss", "moves", "trials", "over first", "over best fixed", "configurations")
    for number, run in enumerate(result["runs"], start=1):
        audit = run["audit"]
        table.add_row(
            str(number),
            f"{run['tokens']:,.0f}",
            f"{run['final_loss']:.2f}",
            str(audit["moves"]),
            f"{audit['trials']} ({100 * audit['trial_seconds'] / audit['training_seconds']:.1f} %)",
            _interval(audit["gain_over_first_pct"]),
            _interval(audit["gain_over_best_fixed_pct"]),
            " → ".join(run["configurations"]),
        )
    console.print(table)
    for verdict in result["verdicts"]:
        console.print(
            f"{'holds' if verdict['holds'] else 'FAILS'}: {verdict['statement']} (worst {verdict['worst']:.3g})"
        )


def _interval(estimate: dict[str, float] | None) -> str:
    return (
        "unknown"
        if estimate is None
        else f"{estimate['value']:+.0f} % ({estimate['low']:.0f} to {estimate['high']:.0f})"
    )


def main() -> int:
    """Run the command; 1 if a statement fails."""
    parser = parser_of("demos", __doc__)
    parser.add_argument("--runs", type=int, default=5, help="how many (%(default)s); one takes some eight minutes")
    parser.add_argument("--neighbour", choices=("busy", "quiet"), default="busy", help="%(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the runs (%(default)s)")
    options = parser.parse_args()
    console = console_of(options)
    result = run_all(options, console)
    tell(result, show, options, console)
    return 0 if all(verdict["holds"] for verdict in result["verdicts"]) else 1


if __name__ == "__main__":
    sys.exit(main())
