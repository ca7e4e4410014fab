"""How long does it take, on this machine's clock, to train to a loss? Policies against fixed batches, over seeds.

    python -m benchmarks.time_to_target [--seeds N] [--quick] [--neighbour quiet,busy] [--decay cosine,constant]
        [--workloads NAME,NAME] [--only NAME,NAME] [--profile-seconds S] [--out DIR] [--json]

Every run is `copus submit` of one job (benchmarks/time_to_target.yaml, changed by the workload) with another policy.

- With `cosine` the learning rate decays to the end of the run, and only the loss at the end counts. Seeds differ in the
  length of the run, which tells what time buys: all runs are brought to one final loss along that slope
  (`benchmarks.time_to_target_gains`). So each policy and each fixed configuration has its own decay to its own end, and
  a run costs no more than it has to.
- With `constant` a run stops at a target loss, on the line between two evaluations.

The time of a run is what it spent measuring throughput, from an empty table, and training: steps, decisions, moves,
trials. Evaluations are left out, which are the benchmark's and not the job's, and what all have in common: starting
processes and reading data. With `busy` another process takes one core half of the time, in the same bursts for all runs
of a seed. Each seed runs everything, in an order that turns from seed to seed. Finished runs are kept in DIR and not
run again: many seeds can be had in several sittings.
"""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from benchmarks.command import console_of, copus_output, overrides_of, parser_of, set_arguments, tell
from benchmarks.neighbour_worker import busy_neighbour
from benchmarks.time_to_target_gains import CELL, Run, crossing, gains
from copus.audit import audit_run
from copus.events import Evaluate, Event, Profile, Reconfigure, Start, Trial, read_events
from copus.job import load_job
from planner.job_estimate import JobEstimate, estimate_job
from profiles.configuration import Configuration
from profiles.table import ThroughputTable

JOB = Path(__file__).with_name("time_to_target.yaml")
OUT = Path("build/time-to-target")
BATCHES = "4,8,16"
NEIGHBOURS = ("quiet", "busy")
DECAYS = ("cosine", "constant")
QUICK = 0.1
"""Share of the tokens that `--quick` trains on."""
PROFILE_SECONDS = 600
"""For finding the fastest configuration of each fixed batch."""
Settings = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A job to train."""

    settings: Settings
    """Over the job file."""
    lengths: tuple[int, ...]
    """Tokens of the runs with a decay; seeds go through them in turn."""
    target_loss: float
    """Where runs without a decay stop."""
    longest: int
    """Tokens after which these give up."""
    lr: float
    """For the job's reference batch: the best for constant batches of 4 and 16, of 4e-4, 8e-4, 1.2e-3, 1.6e-3 and
    3.2e-3 (docs/policies.md)."""


_NARROW: Settings = {"model.hidden": 128, "model.ffn_hidden": 344, "model.heads": 4, "model.kv_heads": 4}
WORKLOADS = {
    "short-sequences": Workload({}, (160_000, 240_000), 5.5, 400_000, 4e-4),
    "deep": Workload({**_NARROW, "model.layers": 8}, (160_000, 240_000), 5.5, 400_000, 1.6e-3),
    "long-sequences": Workload(
        {**_NARROW, "model.layers": 4, "model.seq_len": 256}, (500_000, 750_000), 5.6, 1_500_000, 1.2e-3
    ),
}
WHOLE_TABLE: Settings = {"profile.budget_seconds": 20}
"""For policies that can only choose what was measured. `goodput` takes the cost model's word, and tries."""
ADAPTIVE: dict[str, Settings] = {
    "goodput": {"planner.policy": "goodput", "profile.when": "never"},
    "copus": {"planner.policy": "copus", **WHOLE_TABLE},
}
"""Policies that choose a layout, and have to learn how fast they are."""
FURTHER: dict[str, Settings] = {
    "goodput-measured": {"planner.policy": "goodput"},
    "goodput-lr-aware": {"planner.policy": "goodput", "planner.objective": "lr-aware"},
    "cbs-pessimistic": {"planner.policy": "cbs", "planner.cbs_layout": "pessimistic", **WHOLE_TABLE},
    "cbs-optimistic": {"planner.policy": "cbs", "planner.cbs_layout": "optimistic", **WHOLE_TABLE},
}
"""Run only if they are named with `--only`."""


@dataclass(frozen=True)
class Contender:
    """One way to train the job."""

    name: str
    settings: Settings
    """Over the job file and the workload."""
    rows: Path | None = None
    """Throughput table that its own begins as a copy of; None: as an empty one."""


def contenders(fastest: dict[int, Configuration], table: Path) -> list[Contender]:
    """Every way; `fastest` has the fastest configuration of each fixed batch, in ascending order, as `table` has it.

    The fixed ones, and the schedules, which keep one layout, are told what is fastest: measuring costs them nothing.
    The ramp is that of hindsight too: over half of the run, from half of the smallest fixed batch to the largest one.
    Seesaw begins with the smallest. `goodput-table` is told as much: it is `goodput` in a machine's second job.
    """
    told: Settings = {"profile.when": "never", "planner.start": "job"}
    fixed = [
        Contender(f"static-{batch}", {**told, "planner.policy": "static", **_settings(configuration)})
        for batch, configuration in fastest.items()
    ]
    smallest, largest = min(fastest), max(fastest)
    layout = list(fastest.values())[len(fastest) // 2].layout
    schedules = []
    for name, first in (("ramp", max(smallest // 2, layout.dp)), ("seesaw", smallest)):
        start = Configuration(layout=layout, micro_batch=first // layout.dp, global_batch=first)
        own = {"planner.ramp_start": first, "planner.ramp_increment": first, "planner.max_global_batch": largest}
        own = own if name == "ramp" else {}
        schedules.append(Contender(name, {**told, "planner.policy": name, **_settings(start), **own}, rows=table))
    schedules.append(Contender("goodput-table", ADAPTIVE["goodput"], rows=table))
    policies = [Contender(name, settings) for name, settings in {**ADAPTIVE, **FURTHER}.items()]
    return [*fixed, *schedules, *policies]


def _settings(configuration: Configuration) -> Settings:
    """A configuration to start with. The learning rate stays that of the job's own batch, scaled."""
    return {
        "training.layout": json.dumps(configuration.layout.model_dump(exclude_defaults=True)),
        "training.micro_batch": configuration.micro_batch,
        "training.global_batch": configuration.global_batch,
    }


def measured_of(job_file: Path, settings: Settings, out: Path, budget_seconds: float) -> JobEstimate:
    """Candidates whose steps were measured, or lie on a line between those: everything is measured once, in
    OUT/throughput.jsonl."""
    table = out / "throughput.jsonl"
    settings = {**settings, "profile.table": table, "launch.runs": out / "runs"}
    measuring = {**settings, "profile.budget_seconds": budget_seconds, "profile.rounds": 3}
    copus_output("profile", "run", str(job_file), *_set(measuring))
    job, rows = load_job(job_file, overrides_of(settings)), ThroughputTable(table).rows()
    training = job.training
    estimate = estimate_job(job.planner, job.model, job.cluster, training.precision, training.configuration, rows)
    return replace(estimate, candidates=[one for one in estimate.candidates if one.source != "predicted"])


def fastest_of(
    job_file: Path, settings: Settings, batches: Sequence[int], out: Path, budget_seconds: float = PROFILE_SECONDS
) -> dict[int, Configuration]:
    """The fastest configuration at each fixed batch, of those that `measured_of` has. Raises SystemExit for a batch at
    which nothing was measured."""
    fastest = {
        of_batch.best.configuration.global_batch: of_batch.best.configuration
        for of_batch in measured_of(job_file, settings, out, budget_seconds).fastest()
    }
    if missing := set(batches) - set(fastest):
        raise SystemExit(f"--batches: nothing was measured at a global batch of {min(missing)}")
    return {batch: fastest[batch] for batch in batches}


@dataclass(frozen=True)
class Cell:
    """What a run has in common with those that it is compared with."""

    workload: str
    decay: str
    neighbour: str

    def settings(self, seed: int, scale: float) -> Settings:
        """Over the job file: the workload, and the length of the run, whose tokens are multiplied by `scale`."""
        workload = WORKLOADS[self.workload]
        if self.decay == "constant":
            length = {"training.tokens": round(scale * workload.longest), "training.target_loss": workload.target_loss}
            return {**workload.settings, **length, "training.lr": workload.lr, "training.min_lr": workload.lr}
        tokens = round(scale * workload.lengths[(seed - 1) % len(workload.lengths)])
        rates = {"training.lr": workload.lr, "training.min_lr": workload.lr / 10}
        decay = {"training.decay": "cosine", **rates, "training.target_loss": "null"}
        # Only the end counts; evaluating it well makes up for the noise of one.
        evaluate = {"training.evaluate_every_tokens": 2 * tokens, "training.evaluate_sequences": 512}
        return {**workload.settings, **decay, **evaluate, "training.tokens": tokens}


def train(contender: Contender, cell: Cell, seed: int, scale: float, options: argparse.Namespace) -> Run:
    """Run one contender. Raises SystemExit, with what it said, if it failed."""
    out = options.out.absolute()
    name = f"{cell.workload}-{cell.decay}-{cell.neighbour}-{contender.name}-seed{seed}"
    table = out / "tables" / f"{name}.jsonl"
    table.unlink(missing_ok=True)  # of a run that was stopped
    if contender.rows is not None:
        shutil.copyfile(contender.rows, table)
    settings = {
        **cell.settings(seed, scale),
        "name": name,
        "training.seed": seed,
        "profile.table": table,
        "launch.runs": out / "runs",
        **contender.settings,
    }
    with busy_neighbour(seed) if cell.neighbour == "busy" else nullcontext():
        said = copus_output("submit", str(options.job), "--json", *_set(settings), *set_arguments(options.set))
    run = Path(json.loads(said)["run"])
    job = load_job(run / "job.yaml")
    common = dict(zip(CELL, (cell.workload, cell.decay, cell.neighbour), strict=True))
    return {**common, "policy": contender.name, "seed": seed, **read_run(run, job.training.target_loss)}


def read_run(run: Path, target: float | None) -> dict[str, Any]:
    """What a run's events say of its time. `seconds` is None if it never came to a `target` that it has."""
    events = list(read_events(run))
    start = next(event for event in events if isinstance(event, Start))
    profile_seconds = sum(event.seconds for event in events if isinstance(event, Profile))
    curve, tokens = [], []
    for seconds, event in without_evaluations(events, start.time):
        if isinstance(event, Evaluate) and event.loss is not None:
            curve.append((seconds, event.loss))
            tokens.append((float(event.samples_consumed * start.seq_len), event.loss))
    ended = (curve[-1][0] if curve else None) if target is None else crossing(curve, target)
    audit = audit_run(run)
    return {
        "target_loss": target,
        "seconds": None if ended is None else profile_seconds + ended,
        "training_seconds": ended,
        "profile_seconds": profile_seconds,
        "tokens": tokens[-1][0] if target is None and tokens else crossing(tokens, target or 0.0),
        "final_loss": curve[-1][1] if curve else None,
        "moves": audit.moves,
        "trials": audit.trials,
        "trial_seconds": audit.trial_seconds,
        "audit": audit.model_dump(mode="json", include={"gain_over_first_pct", "gain_over_best_fixed_pct"}),
        "configurations": _path(events),
    }


def without_evaluations(events: Sequence[Event], began: float) -> Iterator[tuple[float, Event]]:
    """Events with their seconds since training began, the time of evaluations left out."""
    evaluated = 0.0
    for event in events:
        if isinstance(event, Evaluate):
            evaluated += event.seconds
        yield event.time - began - evaluated, event


def _path(events: Sequence[Event]) -> list[str]:
    """Labels of the configurations that ran, those of trials left out unless the job stayed."""
    labels = list[str]()
    for event in events:
        if isinstance(event, Start):
            labels.append(event.configuration.label)
        elif isinstance(event, Trial) and event.outcome == "stayed":
            labels.append(event.candidate.label)
        elif isinstance(event, Reconfigure) and not event.trial:
            labels.append(event.after.label)
    return labels


def _set(settings: Settings) -> list[str]:
    return set_arguments(overrides_of(settings))


def run_all(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Whatever is not yet in OUT/results.jsonl is run, and kept there."""
    out = options.out.absolute()
    (out / "tables").mkdir(parents=True, exist_ok=True)
    kept = out / "results.jsonl"
    finished: list[Run] = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {_key(run) for run in finished}
    cells = [Cell(w, d, n) for w in options.workloads for d in options.decay for n in options.neighbour]
    fields = {name: _field(name, options, console) for name in options.workloads}
    seeds = range(1, 1 + options.seeds)
    for seed in seeds:
        for cell in cells:
            field = fields[cell.workload]
            for contender in field[(seed - 1) % len(field) :] + field[: (seed - 1) % len(field)]:
                if (cell.workload, cell.decay, cell.neighbour, contender.name, seed) in done:
                    continue
                run = train(contender, cell, seed, QUICK if options.quick else 1.0, options)
                with open(kept, "a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
                finished.append(run)
                console.print(_line(run), soft_wrap=True)
    wanted = {(*_of(cell), contender.name) for cell in cells for contender in fields[cell.workload]}
    runs = [run for run in finished if _key(run)[:-1] in wanted and run["seed"] in seeds]
    measured = ThroughputTable(out / options.workloads[0] / "throughput.jsonl").rows()[-1].fingerprint
    return {
        "job": options.job.name,
        "hardware": measured.hardware,
        "software": measured.software,
        "runs": runs,
        "gains": gains(runs),
        "gains_without_profiling": gains([{**run, "seconds": run["training_seconds"]} for run in runs]),
    }


def _key(run: Run) -> tuple[Any, ...]:
    return (*(run[name] for name in CELL), run["policy"], run["seed"])


def _of(cell: Cell) -> tuple[str, str, str]:
    return cell.workload, cell.decay, cell.neighbour


def _field(name: str, options: argparse.Namespace, console: Console) -> list[Contender]:
    """Those that a workload is trained by."""
    overrides = dict(override.split("=", 1) for override in options.set)
    batches = [int(text) for text in options.batches.split(",")]
    out = options.out.absolute() / name
    out.mkdir(exist_ok=True)
    settings = {**WORKLOADS[name].settings, **overrides}
    fastest = fastest_of(options.job, settings, batches, out, options.profile_seconds)
    for batch, configuration in fastest.items():
        console.print(f"{name}: fastest at a global batch of {batch}: {configuration.label}")
    every = contenders(fastest, out / "throughput.jsonl")
    return [one for one in every if (one.name in options.only if options.only else one.name not in FURTHER)]


def _line(run: Run) -> str:
    ended = "missed the target" if run["seconds"] is None else f"{run['seconds']:.1f} s"
    loss = "" if run["final_loss"] is None else f"loss {run['final_loss']:.3f}"
    where = " ".join(run[name] for name in CELL)
    return f"seed {run['seed']}  {where}  {run['policy']:14} {ended}  {loss}  {' → '.join(run['configurations'])}"


def show(result: dict[str, Any], console: Console) -> None:
    """A table for each cell, with a line for each policy."""
    console.print(f"{result['hardware']} · {result['software']}")
    cells: defaultdict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in result["runs"]:
        cells[tuple(run[name] for name in CELL)].append(run)
    for cell, runs in cells.items():
        console.print(_table(cell, runs, result))


def _table(cell: tuple[str, ...], runs: list[Run], result: dict[str, Any]) -> Table:
    spelled = {
        key: {row["policy"]: _spelled(row) for row in result[key] if tuple(row[name] for name in CELL) == cell}
        for key in ("gains", "gains_without_profiling")
    }
    title = (
        f"{' · '.join(cell)}: medians over seeds; gain over the best fixed configuration of hindsight, 90 % interval"
    )
    table = Table(Column("policy", no_wrap=True), title=title)
    for column in ("seeds", "seconds", "profiling", "trials", "tokens", "loss", "moves", "gain %", "without profiling"):
        table.add_column(column, justify="right")
    by_policy: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_policy[run["policy"]].append(run)
    for name, members in by_policy.items():
        there = [run for run in members if run["seconds"] is not None]

        def middle(key: str, spelling: str = "{:.1f}", there: list[Run] = there) -> str:
            return spelling.format(float(np.median([run[key] for run in there]))) if there else "–"

        table.add_row(
            name,
            f"{len(there)} of {len(members)}",
            middle("seconds"),
            middle("profile_seconds"),
            middle("trial_seconds"),
            middle("tokens", "{:,.0f}"),
            middle("final_loss", "{:.3f}"),
            middle("moves", "{:.0f}"),
            spelled["gains"].get(name, "–"),
            spelled["gains_without_profiling"].get(name, "–"),
        )
    return table


def _spelled(row: dict[str, Any]) -> str:
    interval = "" if row["low"] is None else f" ({row['low']:+.1f} … {row['high']:+.1f})"
    return f"{row['gain_over_best_fixed_pct']:+.1f}{interval}"


def _names(allowed: Sequence[str]) -> Any:
    """A list with commas of these names."""

    def names(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(allowed):
            raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {', '.join(allowed)}")
        return text.split(",")

    return names


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = parser_of("time_to_target", __doc__)
    parser.add_argument("--job", type=Path, default=JOB, help="job file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override a field of it"
    )
    parser.add_argument("--seeds", type=int, default=None, help="10; 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens, one workload with a decay, quiet")
    parser.add_argument("--workloads", type=_names(list(WORKLOADS)), default=None, help=", ".join(WORKLOADS))
    parser.add_argument("--decay", type=_names(DECAYS), default=None, help=", ".join(DECAYS))
    parser.add_argument("--neighbour", type=_names(NEIGHBOURS), default=None, help=", ".join(NEIGHBOURS))
    parser.add_argument("--batches", default=BATCHES, help="fixed global batches to compare with")
    parser.add_argument(
        "--profile-seconds", type=float, default=PROFILE_SECONDS, help="for finding their fastest layouts"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of policies, with commas")
    parser.add_argument("--out", type=Path, default=None, help=f"folder with the runs, {OUT}; finished ones are kept")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (2 if options.quick else 10)
    options.workloads = options.workloads or list(WORKLOADS)[: 1 if options.quick else None]
    options.decay = options.decay or list(DECAYS[: 1 if options.quick else None])
    options.neighbour = options.neighbour or list(NEIGHBOURS[: 1 if options.quick else None])
    options.out = options.out or (OUT.with_name(f"{OUT.name}-quick") if options.quick else OUT)
    console = console_of(options)
    tell(run_all(options, console), show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
