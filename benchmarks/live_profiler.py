"""One running job moved through the configurations, against one launch for each: wall time, and the same ranking?

`python -m benchmarks.live_profiler` measures every feasible configuration of the demo's model on four ranks, up to a
global batch, both ways: as many timed steps of each, by the same code. Nothing is left out because it looks slow. Both
ways run twice, in turn: by how much the times of each differ from its own second ones tells what the machine allows.

Where there are more ranks than cores, who shares a core with whom decides how fast a layout is: ranks keep to one
(`benchmarks.live_profiler_ranks`), both ways alike.

A process that has just started is not yet as fast as it will be. A configuration is therefore judged by how fast its
launch runs then: after the few timed steps it goes on for `SETTLED_STEPS` more, which do not count as its wall time.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from copus.job import JobConfig, load_job
from planner.space import candidates
from profiles.configuration import Configuration
from profiles.measurement import Measurement

DEMO = Path(__file__).resolve().parent.parent / "examples" / "shakespeare.yaml"
RANKS = 4
SETTLED_STEPS = 20
"""Steps that a launch is timed for once it runs."""
SETTLED = "one job and settled launches, means of both times"
DECIDED = 0.5
"""Share of pairs that have to be told apart: of fewer one cannot say that they rank the same."""


class Measured(NamedTuple):
    """What one way gave, one time."""

    rows: list[Measurement]
    """By as many steps as a profiler takes."""
    settled: list[Measurement]
    """By many more of the same processes, right after; empty for the one job."""
    seconds: float
    """Wall seconds from starting processes to their end, without those of `settled`."""


def make_job(max_batch: int, ranks: int = RANKS) -> JobConfig:
    """The demo on so many ranks, with global batches from a sequence for each of them up."""
    settings = {
        "cluster.accelerators_per_node": ranks,
        "training.layout": f"{{dp: {ranks}}}",
        "training.micro_batch": 1,
        "training.global_batch": ranks,
        "planner.min_global_batch": ranks,
        "planner.max_global_batch": max_batch,
    }
    return load_job(DEMO, [f"{name}={value}" for name, value in settings.items()])


def configurations(job: JobConfig, quick: bool) -> list[Configuration]:
    """Everything that the planner of the job may choose; with `quick` one of each of three layouts."""
    space = candidates(job.planner, job.model, job.cluster, job.training.configuration)
    if not quick:
        return space
    batch = min(configuration.global_batch for configuration in space)
    one_each = {configuration.layout: configuration for configuration in space if configuration.global_batch == batch}
    return list(one_each.values())[:3]


def measure(wanted: list[Configuration], job: JobConfig, settled_steps: int = 0) -> Measured:
    """Start the job's ranks, measure these one after the other, and end them."""
    with tempfile.TemporaryDirectory(prefix="copus-live-profiler-") as name:
        folder = Path(name)
        task = {
            "job": job.model_dump(mode="json"),
            "wanted": [configuration.model_dump() for configuration in wanted],
            "settled_steps": settled_steps,
        }
        (folder / "task.json").write_text(json.dumps(task))
        ranks = job.cluster.accelerators
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "benchmarks.live_profiler_ranks", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        result = folder / "result.json"
        if done.returncode or not result.exists():
            cause = done.stderr[max(0, done.stderr.find("Traceback")) :]
            raise SystemExit(f"the ranks failed ({done.returncode}):\n{cause[:4000]}")
        measured = json.loads(result.read_text())
        rows, settled = ([Measurement.model_validate(row) for row in measured[name]] for name in ("rows", "settled"))
        return Measured(rows, settled, seconds - measured["settled_seconds"])


def launch_each(wanted: list[Configuration], job: JobConfig, turn: str, console: Console) -> Measured:
    """One launch for each of them."""
    total = Measured([], [], 0.0)
    for place, configuration in enumerate(wanted, start=1):
        one = measure([configuration], job, SETTLED_STEPS)
        total = Measured(total.rows + one.rows, total.settled + one.settled, total.seconds + one.seconds)
        console.print(f"{turn} time, launch {place}/{len(wanted)} {configuration.label}: {one.seconds:.1f} s")
    console.print(f"{turn} time, {len(wanted)} launches: {total.seconds:.0f} s")
    return total


def repeatability(one: list[Measurement], again: list[Measurement]) -> float:
    """By how much a median differs from one time to the next, as a share of it: a standard deviation, from the same
    measurements made twice. That all are slower the second time does not count: it changes no ranking."""
    ratios = [
        math.log(_seconds(a) / _seconds(b))
        for a, b in zip(one, again, strict=True)
        if a.step_seconds is not None and b.step_seconds is not None
    ]
    return stdev(ratios) / math.sqrt(2) if len(ratios) > 1 else 0.0


def together(one: list[Measurement], again: list[Measurement]) -> list[Measurement]:
    """The means of what was measured twice; what failed once counts as failed."""
    return [
        a.model_copy(update={"step_seconds": math.sqrt(a.step_seconds * b.step_seconds)})
        if a.step_seconds is not None and b.step_seconds is not None
        else (a if a.step_seconds is None else b)
        for a, b in zip(one, again, strict=True)
    ]


def compare(
    one: list[Measurement], other: list[Measurement], deviations: tuple[float, float] = (0.0, 0.0)
) -> dict[str, Any]:
    """Whether two sets of measurements rank the configurations of each global batch alike.

    A pair is decided where each set sees its two medians apart by more than two standard deviations of their
    difference, which follow from its `repeatability`; it agrees where both then see the same one ahead. `same_ranking`:
    every decided pair agrees, the fastest of each set is among those that the other cannot tell from its own fastest,
    and at least half of all pairs are decided.
    `regret_pct`: what choosing by the first set costs by the second, the worst global batch. `slower_pct`: by how much
    the second set is slower, in the mean; that it is so for some more than for others is the `scatter_pct`.
    """
    first = {row.configuration: row for row in one if row.step_seconds is not None}
    second = {row.configuration: row for row in other if row.step_seconds is not None}
    by_batch: defaultdict[int, list[Configuration]] = defaultdict(list)
    for configuration in first:
        if configuration in second:
            by_batch[configuration.global_batch].append(configuration)
    pairs = decided = agreeing = concordant = fastest = 0
    regret = 0.0
    for members in by_batch.values():
        for a, b in combinations(members, 2):
            pairs += 1
            signs = [_ahead(seen[a], seen[b], by) for seen, by in zip((first, second), deviations, strict=True)]
            concordant += (_seconds(first[a]) < _seconds(first[b])) == (_seconds(second[a]) < _seconds(second[b]))
            if all(signs):
                decided += 1
                agreeing += signs[0] == signs[1]
        best = [min(members, key=lambda configuration: _seconds(seen[configuration])) for seen in (first, second)]
        regret = max(regret, 100 * (_seconds(second[best[0]]) / _seconds(second[best[1]]) - 1))
        fastest += all(
            _ahead(seen[best[0]], seen[best[1]], by) == 0 for seen, by in zip((first, second), deviations, strict=True)
        )
    slower = [
        math.log(_seconds(second[configuration]) / _seconds(first[configuration]))
        for configuration in first
        if configuration in second
    ]
    failures = {row.configuration for row in one if row.failure} == {row.configuration for row in other if row.failure}
    enough = pairs > 0 and decided >= DECIDED * pairs
    return {
        "same_ranking": enough and decided == agreeing and fastest == len(by_batch) and failures,
        "batches": len(by_batch),
        "batches_with_the_same_fastest": fastest,
        "pairs": pairs,
        "pairs_decided": decided,
        "pairs_agreeing": agreeing,
        "regret_pct": regret if by_batch else None,
        "kendall_tau": 2 * concordant / pairs - 1 if pairs else None,
        "slower_pct": 100 * math.expm1(mean(slower)) if slower else None,
        "scatter_pct": 100 * stdev(slower) if len(slower) > 1 else None,
        "same_failures": failures,
    }


def _seconds(row: Measurement) -> float:
    assert row.step_seconds is not None
    return row.step_seconds


def _ahead(a: Measurement, b: Measurement, deviation: float) -> int:
    """1 if a is faster, −1 if b is, 0 if one cannot tell: they are less than two standard deviations of their
    difference apart."""
    apart = math.log(_seconds(b) / _seconds(a))
    return 0 if abs(apart) <= 2 * math.sqrt(2) * deviation else 1 if apart > 0 else -1


def run(quick: bool, max_batch: int, console: Console) -> dict[str, Any]:
    """Both ways, in turn, the one job first."""
    job = make_job(4 if quick else max_batch)
    wanted = configurations(job, quick)
    console.print(f"{len(wanted)} configurations of {job.model.parameters / 1e6:.1f} M parameters on {RANKS} ranks")
    jobs, launches = [], []
    for turn in ("first", "second"):
        jobs.append(measure(wanted, job))
        console.print(f"{turn} time, one job with all of them: {jobs[-1].seconds:.0f} s")
        launches.append(launch_each(wanted, job, turn, console))
    ways = {
        "one job": [job.rows for job in jobs],
        "launches": [launch.rows for launch in launches],
        "settled launches": [launch.settled for launch in launches],
    }
    repeats = {name: repeatability(*both) for name, both in ways.items()}
    rankings = rank(ways, repeats)
    one_job_seconds, launches_seconds = (mean(measured.seconds for measured in way) for way in (jobs, launches))
    fingerprint = jobs[0].rows[0].fingerprint
    return {
        "benchmark": "live_profiler",
        "quick": quick,
        "hardware": fingerprint.hardware,
        "software": fingerprint.software,
        "configurations": len(wanted),
        "steps": job.profile.steps,
        "warmup_steps": job.profile.warmup_steps,
        "settled_steps": SETTLED_STEPS,
        "one_job_seconds": one_job_seconds,
        "one_job_seconds_all": [job.seconds for job in jobs],
        "launches_seconds": launches_seconds,
        "launches_seconds_all": [launch.seconds for launch in launches],
        "speedup": launches_seconds / one_job_seconds,
        "same_ranking": rankings[SETTLED]["same_ranking"],
        "repeatability_pct": {name: 100 * deviation for name, deviation in repeats.items()},
        "rankings": rankings,
        "rows": [
            {
                "configuration": configuration.label,
                **{name: [_time(both[turn][place]) for turn in (0, 1)] for name, both in ways.items()},
            }
            for place, configuration in enumerate(wanted)
        ],
    }


def rank(ways: dict[str, list[list[Measurement]]], repeats: dict[str, float]) -> dict[str, dict[str, Any]]:
    """How each way, measured twice, ranks against others and itself."""

    def means(one: str, other: str) -> dict[str, Any]:
        deviations = (repeats[one] / math.sqrt(2), repeats[other] / math.sqrt(2))
        return compare(together(*ways[one]), together(*ways[other]), deviations)

    def single(one: str, turn: int, other: str, other_turn: int) -> dict[str, Any]:
        return compare(ways[one][turn], ways[other][other_turn], (repeats[one], repeats[other]))

    return {
        SETTLED: means("one job", "settled launches"),
        "one job and settled launches, first times": single("one job", 0, "settled launches", 0),
        "one job and settled launches, second times": single("one job", 1, "settled launches", 1),
        "one job and launches, means of both times": means("one job", "launches"),
        "launches and settled launches, means of both times": means("launches", "settled launches"),
        "one job and itself": single("one job", 0, "one job", 1),
        "launches and themselves": single("launches", 0, "launches", 1),
        "settled launches and themselves": single("settled launches", 0, "settled launches", 1),
    }


def _time(row: Measurement) -> dict[str, Any]:
    return {"step_seconds": row.step_seconds, "spread_seconds": row.spread_seconds, "failure": row.failure}


def show(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    console.print(f"{result['hardware']} · {result['software']}")
    ways = list(result["repeatability_pct"])
    table = Table("configuration", *(heading for name in ways for heading in (f"{name}, ms", "again")))
    for row in result["rows"]:
        table.add_row(row["configuration"], *(_cell(time) for name in ways for time in row[name]))
    console.print(table)
    jobs, launches = (
        " and ".join(f"{seconds:.0f}" for seconds in result[name])
        for name in ("one_job_seconds_all", "launches_seconds_all")
    )
    repeats = ", ".join(f"{percent:.1f} % in {name}" for name, percent in result["repeatability_pct"].items())
    lines = [
        f"{result['steps']} timed steps each, {result['settled_steps']} of a settled launch; "
        f"one job {jobs} s, launches {launches} s: {result['speedup']:.1f}× less wall time",
        f"from one time to the next a median differs by {repeats} (one standard deviation, the machine's common speed "
        "left out); pairs closer than that allows are not decided",
    ]
    for name, order in result["rankings"].items():
        lines.append(
            f"{name}: ranking {'the same' if order['same_ranking'] else 'NOT the same'}: {order['pairs_agreeing']} of "
            f"{order['pairs_decided']} decided pairs agree, of {order['pairs']}; the fastest agrees at "
            f"{order['batches_with_the_same_fastest']} of {order['batches']} batches; choosing by the first costs at "
            f"most {order['regret_pct']:.1f} %; Kendall's τ {order['kendall_tau']:.2f}; the second is "
            f"{order['slower_pct']:+.1f} % slower, with {order['scatter_pct']:.1f} % of scatter"
        )
    console.print("\n".join(lines), soft_wrap=True)


def _cell(time_: dict[str, Any]) -> str:
    if time_["step_seconds"] is None:
        return str(time_["failure"])
    return f"{1000 * time_['step_seconds']:.0f} ± {1000 * time_['spread_seconds']:.0f}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("live_profiler", __doc__)
    parser.add_argument("--quick", action="store_true", help="three configurations: whether it works")
    parser.add_argument("--max-batch", type=int, default=8, help="largest global batch that is measured")
    options = parser.parse_args(arguments)
    console = console_of(options)
    result = run(options.quick, options.max_batch, console)
    tell(result, show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
