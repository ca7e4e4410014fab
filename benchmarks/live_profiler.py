"""One running job moved through the configurations, against one launch for each: wall time, and the same ranking?

`python -m benchmarks.live_profiler` measures every feasible configuration of the demo's model on four ranks, up to a
global batch, both ways: as many timed steps of each, by the same code. Nothing is left out because it looks slow. Both
ways run twice, in turn: by how much the times of each differ from its own second ones tells what the machine allows.
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
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from copus.job import JobConfig, load_job
from planner.space import candidates
from profiles.configuration import Configuration
from profiles.measurement import Measurement

DEMO = Path(__file__).resolve().parent.parent / "examples" / "shakespeare.yaml"
RANKS = 4
BOTH_TIMES = "one job and launches, means of both times"
DECIDED = 0.5
"""Share of pairs that have to be told apart: of fewer one cannot say that they rank the same."""


def make_job(max_batch: int) -> JobConfig:
    """The demo on four ranks, with global batches from 4 sequences up."""
    settings = {
        "cluster.accelerators_per_node": RANKS,
        "training.layout": "{dp: 4}",
        "training.micro_batch": 1,
        "training.global_batch": 4,
        "planner.min_global_batch": 4,
        "planner.max_global_batch": max_batch,
    }
    return load_job(DEMO, [f"{name}={value}" for name, value in settings.items()])


def configurations(job: JobConfig, quick: bool) -> list[Configuration]:
    """Everything that the planner of the job may choose; with `quick` one of each of three layouts."""
    found = candidates(job.planner, job.model, job.cluster, job.training.configuration)
    if not quick:
        return found
    batch = min(each.global_batch for each in found)
    one_each = {each.layout: each for each in found if each.global_batch == batch}
    return list(one_each.values())[:3]


def measure(wanted: list[Configuration], job: JobConfig) -> tuple[list[Measurement], float]:
    """Start four ranks, measure these one after the other, and end them. What was measured; wall seconds of it all."""
    with tempfile.TemporaryDirectory(prefix="copus-live-profiler-") as name:
        folder = Path(name)
        task = {"job": job.model_dump(mode="json"), "wanted": [each.model_dump() for each in wanted]}
        (folder / "task.json").write_text(json.dumps(task))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        command += ["-m", "benchmarks.live_profiler_ranks", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        result = folder / "result.json"
        if done.returncode or not result.exists():
            cause = done.stderr[max(0, done.stderr.find("Traceback")) :]
            raise SystemExit(f"the ranks failed ({done.returncode}):\n{cause[:4000]}")
        return [Measurement.model_validate(row) for row in json.loads(result.read_text())], seconds


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
        best = [min(members, key=lambda each: _seconds(seen[each])) for seen in (first, second)]
        regret = max(regret, 100 * (_seconds(second[best[0]]) / _seconds(second[best[1]]) - 1))
        fastest += all(
            _ahead(seen[best[0]], seen[best[1]], by) == 0 for seen, by in zip((first, second), deviations, strict=True)
        )
    slower = [math.log(_seconds(second[each]) / _seconds(first[each])) for each in first if each in second]
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
    """1 where a is faster, −1 where b is, 0 where one cannot tell: they are less than two standard deviations of their
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
        console.print(f"{turn} time, one job with all of them: {jobs[-1][1]:.0f} s")
        rows, total = [], 0.0
        for place, each in enumerate(wanted, start=1):
            measured, seconds = measure([each], job)
            rows += measured
            total += seconds
            console.print(f"{turn} time, launch {place}/{len(wanted)} {each.label}: {seconds:.1f} s")
        launches.append((rows, total))
        console.print(f"{turn} time, {len(wanted)} launches: {total:.0f} s")
    by_job, by_launch = repeatability(jobs[0][0], jobs[1][0]), repeatability(launches[0][0], launches[1][0])
    means = [together(first, second) for (first, _), (second, _) in (jobs, launches)]
    sets: dict[str, tuple[list[Measurement], list[Measurement], tuple[float, float]]] = {
        BOTH_TIMES: (means[0], means[1], (by_job / math.sqrt(2), by_launch / math.sqrt(2))),
        "one job and launches": (jobs[0][0], launches[0][0], (by_job, by_launch)),
        "one job and launches, again": (jobs[1][0], launches[1][0], (by_job, by_launch)),
        "one job and itself": (jobs[0][0], jobs[1][0], (by_job, by_job)),
        "launches and themselves": (launches[0][0], launches[1][0], (by_launch, by_launch)),
    }
    rankings = {name: compare(*each) for name, each in sets.items()}
    one_job_seconds, launches_seconds = (mean(seconds for _, seconds in each) for each in (jobs, launches))
    fingerprint = jobs[0][0][0].fingerprint
    return {
        "benchmark": "live_profiler",
        "quick": quick,
        "hardware": fingerprint.hardware,
        "software": fingerprint.software,
        "configurations": len(wanted),
        "steps": job.profile.steps,
        "warmup_steps": job.profile.warmup_steps,
        "one_job_seconds": one_job_seconds,
        "one_job_seconds_all": [seconds for _, seconds in jobs],
        "launches_seconds": launches_seconds,
        "launches_seconds_all": [seconds for _, seconds in launches],
        "speedup": launches_seconds / one_job_seconds,
        "same_ranking": rankings[BOTH_TIMES]["same_ranking"],
        "repeatability_pct": {"one job": 100 * by_job, "launches": 100 * by_launch},
        "rankings": rankings,
        "rows": [
            {"configuration": each.label, "one_job": [_time(a), _time(b)], "launch": [_time(c), _time(d)]}
            for each, a, b, c, d in zip(wanted, jobs[0][0], jobs[1][0], launches[0][0], launches[1][0], strict=True)
        ],
    }


def _time(row: Measurement) -> dict[str, Any]:
    return {"step_seconds": row.step_seconds, "spread_seconds": row.spread_seconds, "failure": row.failure}


def show(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    console.print(f"{result['hardware']} · {result['software']}")
    table = Table("configuration", "one job, ms", "again", "a launch, ms", "again")
    for row in result["rows"]:
        table.add_row(row["configuration"], *(_cell(each) for each in (*row["one_job"], *row["launch"])))
    console.print(table)
    jobs, launches = (
        " and ".join(f"{seconds:.0f}" for seconds in result[name])
        for name in ("one_job_seconds_all", "launches_seconds_all")
    )
    repeat = result["repeatability_pct"]
    lines = [
        f"{result['steps']} timed steps each; one job {jobs} s, launches {launches} s: {result['speedup']:.1f}× less "
        "wall time",
        f"from one time to the next a median differs by {repeat['one job']:.1f} % in the one job, "
        f"{repeat['launches']:.1f} % in launches (one standard deviation, the machine's common speed left "
        "out); pairs closer than that allows are not decided",
    ]
    for name, found in result["rankings"].items():
        lines.append(
            f"{name}: ranking {'the same' if found['same_ranking'] else 'NOT the same'}: {found['pairs_agreeing']} of "
            f"{found['pairs_decided']} decided pairs agree, of {found['pairs']}; the fastest agrees at "
            f"{found['batches_with_the_same_fastest']} of {found['batches']} batches; choosing by the first costs at "
            f"most {found['regret_pct']:.1f} %; Kendall's τ {found['kendall_tau']:.2f}; the second is "
            f"{found['slower_pct']:+.1f} % slower, with {found['scatter_pct']:.1f} % of scatter"
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
