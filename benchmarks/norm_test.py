"""The norm test against a constant batch and a warm-up of the batch: loss at equal samples, steps saved, time.

    python -m benchmarks.norm_test [--backend NAME] [--seeds N] [--first-seed N] [--tokens N] [--out DIR]
        [--only runs,simulated,testing] [--rounds N] [--quick] [--json]

As in the paper of DDP-Norm and FSDP-Norm (2412.21124): a small Llama on Shakespeare, data parallel over two CPU cores
with sharded optimizer state, trained on equally many sequences by each policy, in turn, with every seed. The learning
rate follows the root of the batch, for all alike. Each form of the test has the η with which it keeps the batch at
about the noise scale (`ETA`). Then the same policies are simulated with the noise scale that the unbiased norm test has
measured in the newest of the runs in DIR, and what the norms of the workers add to a step is measured, in pairs of
steps.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, copus_output, overrides_of, parser_of, set_arguments, tell
from benchmarks.paired import median_ratio
from benchmarks.time_to_target import JOB, without_evaluations
from copus.data.prepare import prepare
from copus.events import Evaluate, Reconfigure, Start, Step, read_events
from copus.job import load_job
from profiles.configuration import Configuration

OUT = Path("build/norm-test")
PARTS = ("runs", "simulated", "testing")
TOKENS, SEEDS = 64_000, 3
SMALL, LARGE = 4, 32
"""Global batches, in sequences: where every adaptive policy begins, and where it ends at the latest."""
ETA = {"unbiased": 1.0, "paper": 0.7}
"""Unbiased, η = 1 asks for the noise scale itself. The paper's form comes to rest at noise scale × (1/η² − 1), which at
η = 0.7 is about as much; above √½ it would stay below. The smaller η, the sooner either is at the largest batch."""
ROUNDS = 512
"""Pairs of steps, with a test and without."""
Settings = dict[str, Any]
COMMON: Settings = {
    "training.layout": "{dp: 2, zero: 1}",
    "planner.layouts": "[{dp: 2, zero: 1}]",
    "training.reference_batch": SMALL,
    "training.target_loss": "null",
    "training.evaluate_sequences": 256,
    "planner.start": "job",
    "planner.min_global_batch": SMALL,
    "planner.max_global_batch": LARGE,
}
PAPER: Settings = {"planner.norm_test_form": "paper", "planner.norm_test_eta": ETA["paper"]}
UNBIASED: Settings = {"planner.norm_test_form": "unbiased", "planner.norm_test_eta": ETA["unbiased"]}
CONTENDERS: dict[str, Settings] = {
    f"constant-{SMALL}": {"planner.policy": "static"},
    f"constant-{LARGE}": {"planner.policy": "static", "training.global_batch": LARGE, "training.micro_batch": 16},
    "warm-up": {"planner.policy": "ramp", "planner.ramp_start": SMALL, "planner.ramp_increment": SMALL},
    "norm-test-paper": {"planner.policy": "norm-test", **PAPER},
    "norm-test": {"planner.policy": "norm-test", **UNBIASED},
}


def settings_of(options: argparse.Namespace) -> Settings:
    """Over the job file, for all contenders."""
    tokens = options.tokens // (8 if options.quick else 1)
    out = options.out.absolute()
    return {
        **COMMON,
        "training.backend": options.backend,
        "training.tokens": tokens,
        "training.evaluate_every_tokens": tokens // 4,
        "training.global_batch": SMALL,
        "training.micro_batch": SMALL // 2,
        "profile.table": out / "throughput.jsonl",
        "launch.runs": out / "runs",
    }


def train(name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """One run, and what its events say of it."""
    own = {**settings, "name": f"{name}-{seed}", "training.seed": seed, "profile.when": "never"}
    said = copus_output("submit", str(JOB), "--json", *_set(own))
    return {"policy": name, "seed": seed, **read_run(Path(json.loads(said)["run"]))}


def read_run(run: Path) -> dict[str, Any]:
    """Steps, seconds without evaluations, validation losses by sequences, and the batches that ran."""
    events = list(read_events(run))
    start = next(event for event in events if isinstance(event, Start))
    steps = [event for event in events if isinstance(event, Step)]
    trained = [seconds for seconds, event in without_evaluations(events, start.time) if isinstance(event, Step)]
    moves = [event for event in events if isinstance(event, Reconfigure)]
    losses = [[event.samples_consumed, event.loss] for event in events if isinstance(event, Evaluate)]
    return {
        "run": run.name,
        "steps": len(steps),
        "samples": steps[-1].samples_consumed,
        "seconds": trained[-1],
        "losses": losses,
        "loss": losses[-1][1],
        "batches": [[0, start.configuration.global_batch]]
        + [[move.samples_consumed, move.after.global_batch] for move in moves],
    }


def simulate(settings: Settings, run: Path) -> list[dict[str, Any]]:
    """The same policies, with the noise scale as that run measured it."""
    results: list[dict[str, Any]] = []
    for names, own in ((("static", "ramp", "norm-test"), UNBIASED), (("norm-test-paper",), PAPER)):
        policies = [part for name in names for part in ("--policy", name)]
        said = copus_output("simulate", str(JOB), "--like", str(run), "--json", *policies, *_set({**settings, **own}))
        results += json.loads(said)["policies"]
    return results


def extra_of_testing(settings: Settings, rounds: int) -> dict[str, Any]:
    """What the norms of two workers add to a step, in percent of its processor time: other work on the machine does not
    count. Of both ranks together, and of either."""
    from benchmarks.noise_model import step_times
    from tests.ranks import run_ranks

    # `step_times` goes through 4,096 sequences again and again: the job has to be longer than that.
    job = load_job(JOB, overrides_of({**settings, "training.tokens": 5_000 * 64}))
    prepare(job)
    configuration = Configuration(layout=job.training.layout, micro_batch=4, global_batch=16)
    arguments = (job, configuration, rounds, ("replica",), time.process_time)
    ranks = run_ranks(2, step_times, *arguments, timeout_seconds=3600)
    testing, off = (np.array([rank[variant] for rank in ranks]) for variant in ("replica", "off"))
    return {
        "configuration": configuration.label,
        "rounds": rounds,
        "off_seconds": float(np.median(off.sum(axis=0))),
        "adds_pct": median_ratio(testing.sum(axis=0), off.sum(axis=0)),
        "adds_pct_of_rank": [median_ratio(*times) for times in zip(testing, off, strict=True)],
    }


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The parts that are asked for."""
    settings = settings_of(options)
    result: dict[str, Any] = {
        "benchmark": "norm_test",
        "quick": options.quick,
        "backend": options.backend,
        "eta": ETA,
        "tokens": settings["training.tokens"],
    }
    if "runs" in options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        copus_output("profile", "run", str(JOB), *_set({**settings, "profile.budget_seconds": 60}))
        runs = []
        for seed in range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds)):
            for name, own in CONTENDERS.items():
                one = train(name, seed, {**settings, **own})
                line = f"{name}, seed {seed}: {one['steps']} steps, {one['seconds']:.0f} s, loss {one['loss']:.3f}"
                console.print(line)
                runs.append(one)
        result |= {"policies": [summary(name, runs) for name in CONTENDERS], "runs": runs}
    if "simulated" in options.only:
        result["simulated"] = simulate(settings, newest_run(options.out))
    if "testing" in options.only:
        result["testing"] = extra_of_testing(settings, 8 if options.quick else options.rounds)
    return result


def newest_run(out: Path) -> Path:
    """The newest run of the unbiased norm test. Raises SystemExit if there is none."""
    runs = sorted((out.absolute() / "runs").glob("norm-test-[0-9]*"), key=lambda run: run.stat().st_mtime)
    if not runs:
        raise SystemExit(f"--out({out}) has no run of the norm test to simulate from: train with --only runs")
    return runs[-1]


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; the loss also against the small constant batch of the same seed, with least and most."""
    own, first = ([run for run in runs if run["policy"] == policy] for policy in (name, f"constant-{SMALL}"))
    behind = [mine["loss"] - constant["loss"] for mine, constant in zip(own, first, strict=True)]
    steps = float(np.mean([one["steps"] for one in own]))
    return {
        "policy": name,
        "steps": steps,
        "steps_saved_pct": 100 * (1 - steps / float(np.mean([one["steps"] for one in first]))),
        "mean_batch": float(np.mean([one["samples"] / one["steps"] for one in own])),
        "seconds": float(np.mean([one["seconds"] for one in own])),
        "loss": float(np.mean([one["loss"] for one in own])),
        "loss_behind": [min(behind), float(np.mean(behind)), max(behind)],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Two tables, and what a test costs."""
    if "runs" in result:
        _show_runs(result, console)
    if "simulated" in result:
        simulated = Table(title="simulated, with the noise scale that the norm test measured")
        for column in ("policy", "seconds to the same loss", "against best fixed"):
            simulated.add_column(column, justify="left" if column == "policy" else "right")
        for one in result["simulated"]:
            simulated.add_row(one["policy"], f"{one['seconds']:.1f}", f"{one['gain_over_best_fixed_pct']:+.1f} %")
        console.print(simulated)
    if "testing" in result:
        extra = result["testing"]["adds_pct"]
        interval = f"{extra['low']:+.1f} to {extra['high']:+.1f}"
        console.print(f"a step that tests takes {extra['median']:+.1f} % more processor time ({interval} %)")


def _show_runs(result: dict[str, Any], console: Console) -> None:
    seeds = len({run["seed"] for run in result["runs"]})
    etas = ", ".join(f"η {eta:g} {form}" for form, eta in result["eta"].items())
    table = Table(title=f"{result['tokens']:,} tokens each on {result['backend']}, {seeds} seeds, {etas}")
    figures = ("steps", "saved", "mean batch", "seconds", "loss", f"more than constant-{SMALL}")
    for column in ("policy", *figures, "batches"):
        table.add_column(column, justify="left" if column in ("policy", "batches") else "right")
    for one in result["policies"]:
        least, mean, most = one["loss_behind"]
        batches = next(run["batches"] for run in result["runs"] if run["policy"] == one["policy"])
        table.add_row(
            one["policy"],
            f"{one['steps']:.0f}",
            f"{one['steps_saved_pct']:.0f} %",
            f"{one['mean_batch']:.1f}",
            f"{one['seconds']:.1f}",
            f"{one['loss']:.3f}",
            f"{mean:+.3f} ({least:+.3f} to {most:+.3f})",
            " → ".join(f"{batch} at {samples}" for samples, batch in batches),
        )
    console.print(table)


def _set(settings: Settings) -> list[str]:
    return set_arguments(overrides_of(settings))


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {', '.join(PARTS)}")
    return parts


def main() -> None:
    """The command."""
    parser = parser_of("norm_test", __doc__)
    parser.add_argument("--backend", choices=("megatron", "fsdp", "deepspeed"), default="fsdp", help="what trains")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each policy")
    parser.add_argument("--first-seed", type=int, default=1, help="seed of the first run of each policy")
    parser.add_argument("--only", type=_parts, default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="length of every run")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of steps, with a test and without")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for runs and the throughput table")
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens, one seed")
    options = parser.parse_args()
    console = console_of(options)
    tell(run(options, console), show, options, console)


if __name__ == "__main__":
    main()
