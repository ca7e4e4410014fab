"""One running job moved through the configurations, against one launch for each: wall time, and the same ranking?

`python -m benchmarks.live_profiler` measures every feasible configuration of the demo's model on four ranks, up to a
global batch, both ways: as many timed steps of each, by the same code. Nothing is left out because it looks slow. The
one job runs twice, before and after all launches: by how much its own times differ tells what the machine allows.
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
from statistics import mean, variance
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from copus.job import JobConfig, load_job
from planner.space import candidates
from profiles.config import ProfileConfig
from profiles.configuration import Configuration
from profiles.measurement import Measurement

DEMO = Path(__file__).resolve().parent.parent / "examples" / "shakespeare.yaml"
RANKS = 4
STEPS = ProfileConfig()
"""How many steps go before a measurement and are timed: as many as in a job that says nothing about it."""
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
        "profile.warmup_steps": STEPS.warmup_steps,
        "profile.steps": STEPS.steps,
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
    """By how much a median differs from visit to visit, as a share of it, beyond what its own steps tell: a standard
    deviation, from the same measurements made twice. That the second time is slower for all does not count."""
    both = [pair for pair in zip(one, again, strict=True) if all(row.step_seconds is not None for row in pair)]
    if len(both) < 2:
        return 0.0
    drift = variance(math.log(_seconds(a) / _seconds(b)) for a, b in both)
    within = mean(sum((_deviation(row) / _seconds(row)) ** 2 for row in pair) for pair in both)
    return math.sqrt(max(0.0, drift - within) / 2)


def compare(one: list[Measurement], other: list[Measurement], visit_sd: float = 0.0) -> dict[str, Any]:
    """Whether two sets of measurements rank the configurations of each global batch alike.

    A pair is decided where both sets see its two medians apart by more than two standard deviations of their
    difference, `visit_sd` (`repeatability`) included; it agrees where both then see the same one ahead. `same_ranking`:
    every decided pair agrees, the fastest of each set is among those that the other cannot tell from its own fastest,
    and at least half of all pairs are decided.
    `regret_pct`: what choosing by the first set costs by the second, the worst global batch.
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
            signs = [_ahead(seen[a], seen[b], visit_sd) for seen in (first, second)]
            concordant += (_seconds(first[a]) < _seconds(first[b])) == (_seconds(second[a]) < _seconds(second[b]))
            if all(signs):
                decided += 1
                agreeing += signs[0] == signs[1]
        best = [min(members, key=lambda each: _seconds(seen[each])) for seen in (first, second)]
        regret = max(regret, 100 * (_seconds(second[best[0]]) / _seconds(second[best[1]]) - 1))
        fastest += all(_ahead(seen[best[0]], seen[best[1]], visit_sd) == 0 for seen in (first, second))
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
        "same_failures": failures,
    }


def _seconds(row: Measurement) -> float:
    assert row.step_seconds is not None
    return row.step_seconds


def _deviation(row: Measurement) -> float:
    """Standard deviation of its median, by its own steps: 1.25 σ/√n, and the spread, half of the way from the 10th to
    the 90th percentile, is 1.28 σ."""
    return 1.25 / 1.28 * (row.spread_seconds or 0) / math.sqrt(row.count)


def _ahead(a: Measurement, b: Measurement, visit_sd: float) -> int:
    """1 where a is faster, −1 where b is, 0 where one cannot tell."""
    apart = _seconds(b) - _seconds(a)
    deviation = math.hypot(*(each for row in (a, b) for each in (_deviation(row), visit_sd * _seconds(row))))
    return 0 if abs(apart) <= 2 * deviation else 1 if apart > 0 else -1


def run(quick: bool, max_batch: int, console: Console) -> dict[str, Any]:
    """Both ways, the one job first."""
    job = make_job(4 if quick else max_batch)
    wanted = configurations(job, quick)
    console.print(f"{len(wanted)} configurations of {job.model.parameters / 1e6:.1f} M parameters on {RANKS} ranks")
    in_one, first_seconds = measure(wanted, job)
    console.print(f"one job with all of them: {first_seconds:.0f} s")
    launched, launches = [], []
    for place, each in enumerate(wanted, start=1):
        rows, seconds = measure([each], job)
        launched += rows
        launches.append(seconds)
        console.print(f"launch {place}/{len(wanted)} {each.label}: {seconds:.1f} s")
    again, second_seconds = measure(wanted, job)
    console.print(f"one job again: {second_seconds:.0f} s")
    one_job_seconds = (first_seconds + second_seconds) / 2
    visit_sd = repeatability(in_one, again)
    sets = {
        "one job and launches": (in_one, launched),
        "one job again and launches": (again, launched),
        "one job and one job again": (in_one, again),
    }
    rankings = {name: compare(*pair, visit_sd) for name, pair in sets.items()}
    fingerprint = in_one[0].fingerprint
    return {
        "benchmark": "live_profiler",
        "quick": quick,
        "hardware": fingerprint.hardware,
        "software": fingerprint.software,
        "configurations": len(wanted),
        "steps": STEPS.steps,
        "warmup_steps": STEPS.warmup_steps,
        "one_job_seconds": one_job_seconds,
        "one_job_seconds_all": [first_seconds, second_seconds],
        "launches_seconds": sum(launches),
        "speedup": sum(launches) / one_job_seconds,
        "launch_seconds_all": launches,
        "same_ranking": all(found["same_ranking"] for found in rankings.values()),
        "visit_sd_pct": 100 * visit_sd,
        "rankings": rankings,
        "rankings_by_steps_alone": {name: compare(*pair) for name, pair in sets.items()},
        "rows": [
            {"configuration": each.label, "one_job": _time(a), "launch": _time(b), "again": _time(c)}
            for each, a, b, c in zip(wanted, in_one, launched, again, strict=True)
        ],
    }


def _time(row: Measurement) -> dict[str, Any]:
    return {"step_seconds": row.step_seconds, "spread_seconds": row.spread_seconds, "failure": row.failure}


def show(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    console.print(f"{result['hardware']} · {result['software']}")
    table = Table("configuration", "one job, ms", "a launch, ms", "one job again, ms")
    for row in result["rows"]:
        table.add_row(row["configuration"], *(_cell(row[name]) for name in ("one_job", "launch", "again")))
    console.print(table)
    jobs = " and ".join(f"{seconds:.0f}" for seconds in result["one_job_seconds_all"])
    lines = [
        f"one job {jobs} s, launches {result['launches_seconds']:.0f} s: {result['speedup']:.1f}× less wall time",
        f"from visit to visit the time of a configuration differs by {result['visit_sd_pct']:.1f} % (one standard "
        "deviation, beyond the spread of its steps, the machine's common speed left out): closer pairs are not decided",
    ]
    for name, found in result["rankings"].items():
        alone = result["rankings_by_steps_alone"][name]
        lines.append(
            f"{name}: ranking {'the same' if found['same_ranking'] else 'NOT the same'}: {found['pairs_agreeing']} of "
            f"{found['pairs_decided']} decided pairs agree, of {found['pairs']} (by the spread of the steps alone "
            f"{alone['pairs_agreeing']} of {alone['pairs_decided']}); the fastest agrees at "
            f"{found['batches_with_the_same_fastest']} of {found['batches']} batches; choosing by the first costs at "
            f"most {found['regret_pct']:.1f} %; Kendall's τ {found['kendall_tau']:.2f}"
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
