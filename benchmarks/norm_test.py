"""The norm test against a constant batch and a warm-up of the batch: loss at equal samples, steps saved, time.

    python -m benchmarks.norm_test [--tokens N] [--out DIR] [--quick] [--json]

As in the paper of DDP-Norm and FSDP-Norm (2412.21124): a small Llama on Shakespeare, data parallel over two CPU cores,
trained on equally many sequences by each policy, in turn. The learning rate follows the root of the batch, for all
alike. Then the same policies are simulated with the noise scale that the unbiased norm test has measured, and what the
norms of the workers add to a step is measured, in pairs of steps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, copus_output, parser_of, tell
from benchmarks.noise import paired
from benchmarks.time_to_target import JOB, without_evaluations
from copus.events import Evaluate, Reconfigure, Start, Step, read_events
from copus.job import load_job
from profiles.configuration import Configuration

OUT = Path("build/norm-test")
TOKENS = 200_000
SMALL, LARGE = 4, 32
"""Global batches, in sequences: where every adaptive policy begins, and where it ends at the latest."""
ETA = 0.5
Settings = dict[str, Any]
COMMON: Settings = {
    "training.layout": "{dp: 2}",
    "planner.layouts": "[{dp: 2}]",
    "training.reference_batch": SMALL,
    "training.target_loss": "null",
    "training.evaluate_sequences": 256,
    "planner.start": "job",
    "planner.min_global_batch": SMALL,
    "planner.max_global_batch": LARGE,
    "planner.norm_test_eta": ETA,
}
CONTENDERS: dict[str, Settings] = {
    f"constant-{SMALL}": {"planner.policy": "static"},
    f"constant-{LARGE}": {"planner.policy": "static", "training.global_batch": LARGE, "training.micro_batch": 16},
    "warm-up": {"planner.policy": "ramp", "planner.ramp_start": SMALL, "planner.ramp_increment": SMALL},
    "norm-test-paper": {"planner.policy": "norm-test", "planner.norm_test_form": "paper"},
    "norm-test": {"planner.policy": "norm-test"},
}
SIMULATED = ("static", "ramp", "norm-test-paper", "norm-test")


def settings_of(tokens: int, out: Path) -> Settings:
    """Over the job file, for all contenders."""
    return {
        **COMMON,
        "training.tokens": tokens,
        "training.evaluate_every_tokens": tokens // 8,
        "training.global_batch": SMALL,
        "training.micro_batch": SMALL // 2,
        "profile.table": out / "throughput.jsonl",
        "launch.runs": out / "runs",
    }


def train(name: str, settings: Settings) -> dict[str, Any]:
    """One run, and what its events say of it."""
    said = copus_output("submit", str(JOB), "--json", *_set({**settings, "name": name, "profile.when": "never"}))
    return {"policy": name, **read_run(Path(json.loads(said)["run"]))}


def read_run(run: Path) -> dict[str, Any]:
    """Steps, seconds without evaluations, validation losses by sequences, and the batches that ran."""
    events = list(read_events(run))
    start = next(event for event in events if isinstance(event, Start))
    steps = [event for event in events if isinstance(event, Step)]
    trained = [seconds for seconds, event in without_evaluations(events, start.time) if isinstance(event, Step)]
    moves = [event for event in events if isinstance(event, Reconfigure)]
    return {
        "run": str(run),
        "steps": len(steps),
        "samples": steps[-1].samples_consumed,
        "seconds": trained[-1],
        "losses": [[e.samples_consumed, e.loss] for e in events if isinstance(e, Evaluate)],
        "batches": [[0, start.configuration.global_batch]]
        + [[move.samples_consumed, move.after.global_batch] for move in moves],
    }


def simulate(settings: Settings, run: str) -> list[dict[str, Any]]:
    """The same policies, with the noise scale as that run measured it."""
    policies = [part for name in SIMULATED for part in ("--policy", name)]
    said = copus_output("simulate", str(JOB), "--like", run, "--json", *policies, *_set(settings))
    result: list[dict[str, Any]] = json.loads(said)["policies"]
    return result


def extra_of_testing(settings: Settings, rounds: int) -> dict[str, float]:
    """What the norms of two workers add to a step, in percent."""
    from benchmarks.noise_model import step_times
    from tests.ranks import run_ranks

    # `step_times` goes through 4,096 sequences again and again: the job has to be longer than that.
    job = load_job(JOB, _overrides({**settings, "training.tokens": 5_000 * 64}))
    configuration = Configuration(layout=job.training.layout, micro_batch=4, global_batch=16)
    seconds = run_ranks(2, step_times, job, configuration, rounds, timeout_seconds=1200)[0]
    return paired(seconds["replica"], seconds["off"], 1)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything."""
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options.tokens // (8 if options.quick else 1), out)
    copus_output("profile", "run", str(JOB), *_set({**settings, "profile.budget_seconds": 60}))
    runs = []
    for name, own in CONTENDERS.items():
        runs.append(train(name, {**settings, **own}))
        console.print(f"{name}: {runs[-1]['steps']} steps, {runs[-1]['seconds']:.0f} s, loss {_loss(runs[-1]):.3f}")
    first = runs[0]
    for result in runs:
        result["final_loss"] = _loss(result)
        result["steps_saved_pct"] = 100 * (1 - result["steps"] / first["steps"])
        result["seconds_saved_pct"] = 100 * (1 - result["seconds"] / first["seconds"])
        result["mean_batch"] = result["samples"] / result["steps"]
    return {
        "benchmark": "norm_test",
        "quick": options.quick,
        "eta": ETA,
        "tokens": settings["training.tokens"],
        "runs": runs,
        "simulated": simulate(settings, runs[-1]["run"]),
        "testing_adds_pct": extra_of_testing(settings, 8 if options.quick else 64),
    }


def _loss(result: dict[str, Any]) -> float:
    return float(result["losses"][-1][1])


def show(result: dict[str, Any], console: Console) -> None:
    """Two tables, and what a test costs."""
    table = Table(title=f"{result['tokens']:,} tokens each, η {result['eta']:g}")
    for column in ("policy", "steps", "saved", "mean batch", "seconds", "loss", "batches"):
        table.add_column(column, justify="left" if column in ("policy", "batches") else "right")
    for one in result["runs"]:
        table.add_row(
            one["policy"],
            str(one["steps"]),
            f"{one['steps_saved_pct']:.0f} %",
            f"{one['mean_batch']:.1f}",
            f"{one['seconds']:.1f}",
            f"{one['final_loss']:.3f}",
            " → ".join(f"{batch} at {samples}" for samples, batch in one["batches"]),
        )
    console.print(table)
    simulated = Table(title="simulated, with the noise scale that the norm test measured")
    for column in ("policy", "seconds to the same loss", "against best fixed"):
        simulated.add_column(column, justify="left" if column == "policy" else "right")
    for one in result["simulated"]:
        simulated.add_row(one["policy"], f"{one['seconds']:.1f}", f"{one['gain_over_best_fixed_pct']:+.1f} %")
    console.print(simulated)
    extra = result["testing_adds_pct"]
    interval = f"{extra['low']:+.1f} to {extra['high']:+.1f}"
    console.print(f"a step that tests takes {extra['median']:+.1f} % longer ({interval} %)")


def _overrides(settings: Settings) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def _set(settings: Settings) -> list[str]:
    return [part for override in _overrides(settings) for part in ("--set", override)]


def main() -> None:
    """The command."""
    parser = parser_of("norm_test", __doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="length of every run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for runs and the throughput table")
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens")
    options = parser.parse_args()
    console = console_of(options)
    tell(run(options, console), show, options, console)


if __name__ == "__main__":
    main()
