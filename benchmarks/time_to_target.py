"""How long does it take, on this machine's clock, to train to a loss? Every policy, the same job, several seeds.

    python -m benchmarks.time_to_target [--job FILE] [--seeds N] [--quick] [--out DIR] [--only NAME,NAME] [--json]

Every run is `copus submit` of the same job with another policy, to `training.target_loss`. Its time is what it spent
measuring throughput, from an empty table, and training: steps, evaluations, decisions and moves. Not counted is what
all have in common: starting processes and reading data. Each seed runs all policies, in an order that turns from seed
to seed. Finished runs are kept in DIR and not run again, so that a benchmark that was stopped goes on.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from scipy import stats

from benchmarks.command import console_of, parser_of, tell
from copus.events import Evaluate, Event, Profile, Reconfigure, Start, read_events
from copus.job import JobConfig, load_job
from planner.job_estimate import estimate_job
from profiles.configuration import Configuration
from profiles.table import ThroughputTable

JOB = Path(__file__).with_name("time_to_target.yaml")
OUT = Path("build/time-to-target")
BATCHES = "8,16,32"
Settings = dict[str, Any]
WHOLE_TABLE: Settings = {"profile.budget_seconds": 20}
"""For policies that can only choose what was measured. `goodput` takes the cost model's word for the rest."""
ADAPTIVE: dict[str, Settings] = {
    "cbs-pessimistic": {"planner.policy": "cbs", "planner.cbs_layout": "pessimistic", **WHOLE_TABLE},
    "cbs-optimistic": {"planner.policy": "cbs", "planner.cbs_layout": "optimistic", **WHOLE_TABLE},
    "copus": {"planner.policy": "copus", **WHOLE_TABLE},
    "goodput": {"planner.policy": "goodput"},
    "goodput-unmeasured": {"planner.policy": "goodput", "profile.when": "never"},
    "goodput-lr-aware": {"planner.policy": "goodput", "planner.objective": "lr-aware"},
    "goodput-lr-constant": {"planner.policy": "goodput", "training.optimizer.lr_batch_exponent": 0},
    "goodput-lr-linear": {"planner.policy": "goodput", "training.optimizer.lr_batch_exponent": 1},
}
"""Policies that choose a layout, and have to learn how fast they are."""


@dataclass(frozen=True)
class Contender:
    """One way to train the job."""

    name: str
    settings: Settings
    """Over the job file."""


def contenders(fastest: dict[int, Configuration]) -> list[Contender]:
    """Every policy; `fastest` has the fastest configuration of each fixed batch.

    The fixed ones are told what is fastest: measuring costs them nothing. So is the norm test, which keeps its layout:
    it has that of the fixed batch in the middle.
    """
    known: Settings = {"profile.when": "never"}
    static = [
        Contender(f"static-{batch}", {**known, "planner.policy": "static", **_settings(configuration)})
        for batch, configuration in fastest.items()
    ]
    middle = list(fastest.values())[len(fastest) // 2]
    smallest = middle.model_copy(update={"micro_batch": 1, "global_batch": max(2, middle.layout.dp)})
    norm_test = Contender("norm-test", {**known, "planner.policy": "norm-test", **_settings(smallest)})
    return [*static, norm_test, *(Contender(name, settings) for name, settings in ADAPTIVE.items())]


def _settings(configuration: Configuration) -> Settings:
    """A configuration to start with. The learning rate stays that of the job's own batch, scaled."""
    return {
        "training.layout": json.dumps(configuration.layout.model_dump(exclude_defaults=True)),
        "training.micro_batch": configuration.micro_batch,
        "training.global_batch": configuration.global_batch,
    }


def fastest_of(job_file: Path, overrides: Sequence[str], batches: Sequence[int], out: Path) -> dict[int, Configuration]:
    """The fastest configuration at each fixed batch: everything is measured once, in OUT/throughput.jsonl."""
    table = out / "throughput.jsonl"
    settings = [*overrides, f"profile.table={table}", f"launch.runs={out / 'runs'}"]
    _copus("profile", "run", str(job_file), *_set([*settings, "profile.budget_seconds=600", "profile.rounds=3"]))
    job, rows = load_job(job_file, settings), ThroughputTable(table).rows()
    training = job.training
    estimate = estimate_job(job.planner, job.model, job.cluster, training.precision, training.configuration, rows)
    measured = [each for each in estimate.candidates if each.source != "predicted"]
    found = {
        each.best.configuration.global_batch: each.best.configuration
        for each in replace(estimate, candidates=measured).fastest()
    }
    if missing := set(batches) - set(found):
        raise SystemExit(f"--batches: nothing was measured at a global batch of {min(missing)}")
    return {batch: found[batch] for batch in batches}


def train(contender: Contender, job_file: Path, overrides: Sequence[str], seed: int, out: Path) -> dict[str, Any]:
    """Run one contender to the target. Raises SystemExit, with what it said, where it failed."""
    name = f"{contender.name}-seed{seed}"
    table = out / "tables" / f"{name}.jsonl"
    table.unlink(missing_ok=True)  # of a run that was stopped
    settings = {
        **contender.settings,
        "name": name,
        "training.seed": seed,
        "profile.table": table,
        "launch.runs": out / "runs",
    }
    said = _copus("submit", str(job_file), "--json", *_set([*overrides, *(f"{k}={v}" for k, v in settings.items())]))
    run = Path(json.loads(said)["run"])
    job = load_job(run / "job.yaml")
    return {"policy": contender.name, "seed": seed, **read_run(list(read_events(run)), job)}


def read_run(events: Sequence[Event], job: JobConfig) -> dict[str, Any]:
    """What a run's events say of its time. `seconds` is None where it never came to the target."""
    start = next(event for event in events if isinstance(event, Start))
    target = job.training.target_loss
    assert target is not None, "the job of this benchmark has a target"
    evaluations = [event for event in events if isinstance(event, Evaluate) and event.loss is not None]
    profile_seconds = sum(event.seconds for event in events if isinstance(event, Profile))
    crossed = crossing([(event.time - start.time, float(event.loss or 0)) for event in evaluations], target)
    tokens = crossing(
        [(event.samples_consumed * start.seq_len, float(event.loss or 0)) for event in evaluations], target
    )
    moves = [event for event in events if isinstance(event, Reconfigure)]
    return {
        "target_loss": target,
        "seconds": None if crossed is None else profile_seconds + crossed,
        "training_seconds": crossed,
        "profile_seconds": profile_seconds,
        "tokens": tokens,
        "last_loss": evaluations[-1].loss if evaluations else None,
        "moves": len(moves),
        "layout_moves": sum(move.rung == "layout" for move in moves),
        "configurations": [start.configuration.label, *(move.after.label for move in moves)],
    }


def crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where a curve of (place, loss) first comes down to the target, on the line between two evaluations."""
    for (place, loss), (next_place, next_loss) in pairwise(curve):
        if next_loss <= target:
            share = (loss - target) / (loss - next_loss) if loss > next_loss else 1.0
            return place + share * (next_place - place)
    return None


def gains(runs: Sequence[dict[str, Any]], clock: str) -> dict[str, dict[str, float | None]]:
    """By policy: how much sooner than the best fixed configuration it was there, in percent, with its 90 % interval.

    The best fixed configuration is the one with the smallest mean over seeds, seen with hindsight. Each seed is a pair;
    the interval is Student's, on the logarithm of the ratio. A policy that missed the target has no figure.
    """
    seconds: defaultdict[str, dict[int, float]] = defaultdict(dict)
    missed = set()
    for run in runs:
        if run[clock] is None:
            missed.add(run["policy"])
        else:
            seconds[run["policy"]][run["seed"]] = run[clock]
    fixed = [name for name in seconds if name.startswith("static-") and name not in missed]
    if not fixed:
        return {}
    best = seconds[min(fixed, key=lambda name: float(np.mean(np.log(list(seconds[name].values())))))]
    result = {}
    for name, own in seconds.items():
        ratios = [math.log(best[seed] / own[seed]) for seed in own if seed in best]
        if name in missed or not ratios:
            continue
        mean, half = float(np.mean(ratios)), None
        if len(ratios) > 1:
            half = float(stats.t.ppf(0.95, len(ratios) - 1) * np.std(ratios, ddof=1) / math.sqrt(len(ratios)))
        result[name] = {
            "gain_pct": 100 * math.expm1(mean),
            "low_pct": None if half is None else 100 * math.expm1(mean - half),
            "high_pct": None if half is None else 100 * math.expm1(mean + half),
        }
    return result


def _copus(*arguments: str) -> str:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"copus {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def _set(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def run_all(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Whatever is not yet in OUT/results.jsonl is run, and kept there."""
    out = options.out.absolute()
    (out / "tables").mkdir(parents=True, exist_ok=True)
    kept = out / "results.jsonl"
    finished = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    batches = [int(each) for each in options.batches.split(",")]
    fastest = fastest_of(options.job, options.set, batches, out)
    for batch, configuration in fastest.items():
        console.print(f"fastest at a global batch of {batch}: {configuration.label}")
    field = contenders(fastest)
    if options.only:
        field = [each for each in field if each.name in options.only.split(",")]
    seeds = range(1, 1 + (1 if options.quick else options.seeds))
    done = {(run["policy"], run["seed"]) for run in finished}
    for seed in seeds:
        turned = field[(seed - 1) % len(field) :] + field[: (seed - 1) % len(field)]
        for contender in turned:
            if (contender.name, seed) in done:
                continue
            run = train(contender, options.job, options.set, seed, out)
            with open(kept, "a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            finished.append(run)
            seconds = "missed the target" if run["seconds"] is None else f"{run['seconds']:.1f} s"
            console.print(f"seed {seed}  {contender.name:20} {seconds}  {' → '.join(run['configurations'])}")
    measured = ThroughputTable(out / "throughput.jsonl").rows()[-1].fingerprint
    shown = [run for run in finished if run["policy"] in {each.name for each in field} and run["seed"] in seeds]
    return {
        "job": options.job.name,
        "hardware": measured.hardware,
        "software": measured.software,
        "fastest_at": {str(batch): configuration.label for batch, configuration in fastest.items()},
        "runs": shown,
        "gain_over_best_fixed_pct": gains(shown, "seconds"),
        "gain_without_profiling_pct": gains(shown, "training_seconds"),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """A line for each policy."""
    console.print(f"{result['hardware']} · {result['software']}")
    table = Table(
        Column("policy", no_wrap=True),
        title="time to the target loss: medians over seeds; gain over the best fixed, 90 % interval",
    )
    for column in ("seeds", "seconds", "profiling", "tokens", "moves", "gain %", "without profiling"):
        table.add_column(column, justify="right")
    by_policy: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in result["runs"]:
        by_policy[run["policy"]].append(run)
    for name, runs in by_policy.items():
        there = [run for run in runs if run["seconds"] is not None]

        def middle(key: str, there: list[dict[str, Any]] = there, spelled: str = "{:.1f}") -> str:
            return spelled.format(float(np.median([run[key] for run in there]))) if there else "–"

        table.add_row(
            name,
            f"{len(there)} of {len(runs)}",
            middle("seconds"),
            middle("profile_seconds"),
            middle("tokens", spelled="{:,.0f}"),
            middle("moves", spelled="{:.0f}"),
            _spelled(result["gain_over_best_fixed_pct"].get(name)),
            _spelled(result["gain_without_profiling_pct"].get(name)),
        )
    console.print(table)


def _spelled(gain: dict[str, float | None] | None) -> str:
    if gain is None:
        return "–"
    low, high = gain["low_pct"], gain["high_pct"]
    return f"{gain['gain_pct']:+.1f}" + ("" if low is None or high is None else f" ({low:+.1f} … {high:+.1f})")


def main() -> int:
    """Run the command."""
    parser = parser_of("time_to_target", __doc__)
    parser.add_argument("--job", type=Path, default=JOB, help="job file with a training.target_loss")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override a field of it"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--batches", default=BATCHES, help="fixed global batches to compare with")
    parser.add_argument("--only", help="names of policies, with commas")
    parser.add_argument("--out", type=Path, default=OUT, help="folder with the runs; finished ones are not run again")
    options = parser.parse_args()
    console = console_of(options)
    tell(run_all(options, console), show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
