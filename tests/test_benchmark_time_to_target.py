"""What the benchmark of real runs makes of their events: where a curve crosses, and who was sooner."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import time_to_target
from benchmarks.neighbour_worker import busy_neighbour
from benchmarks.time_to_target import DECAYS, WORKLOADS, Cell, contenders, fastest_of, without_evaluations
from benchmarks.time_to_target_gains import at_equal_loss, crossing, gains, loss_slope
from copus.events import Evaluate
from copus.job import load_job
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.table import ThroughputTable


def _run(policy: str, seed: int, seconds: float | None) -> dict[str, Any]:
    cell = {"workload": "w", "decay": "constant", "neighbour": "quiet", "target_loss": 5.5}
    return {**cell, "policy": policy, "seed": seed, "seconds": seconds}


def test_a_curve_crosses_on_the_line_between_two_evaluations() -> None:
    assert crossing([(0, 8.0), (10, 6.0), (20, 5.0)], 5.5) == pytest.approx(15)
    assert crossing([(0, 8.0), (10, 6.0), (20, 6.5), (30, 5.5)], 5.5) == pytest.approx(30)


def test_the_first_crossing_counts() -> None:
    assert crossing([(0, 6.0), (10, 5.0), (20, 6.0), (30, 5.0)], 5.5) == pytest.approx(5)


def test_a_curve_that_stays_above_never_crosses() -> None:
    assert crossing([(0, 8.0), (10, 6.0)], 5.5) is None
    assert crossing([(0, 5.0)], 5.5) is None


def test_gains_are_over_the_fixed_configuration_that_is_best_over_all_seeds() -> None:
    runs = [
        _run("static-8", 1, 90.0),
        _run("static-8", 2, 120.0),
        _run("static-32", 1, 100.0),
        _run("static-32", 2, 100.0),
        _run("goodput", 1, 80.0),
        _run("goodput", 2, 100.0),
    ]
    rows = {row["policy"]: row for row in gains(runs)}
    assert rows["goodput"]["best_fixed"] == "static-32"
    assert rows["static-32"]["gain_over_best_fixed_pct"] == pytest.approx(0)
    assert rows["goodput"]["gain_over_best_fixed_pct"] == pytest.approx(100 * (math.sqrt(100 / 80) - 1))
    assert rows["goodput"]["low"] < rows["goodput"]["gain_over_best_fixed_pct"] < rows["goodput"]["high"]


def test_a_fixed_configuration_that_was_given_up_is_not_the_best_one() -> None:
    runs = [_run("static-8", seed, 100.0) for seed in (1, 2)]
    rows = {row["policy"]: row for row in gains([*runs, _run("static-4", 1, 90.0)])}
    assert rows["static-4"]["best_fixed"] == "static-8"
    assert rows["static-4"]["seeds"] == 1


def test_one_seed_has_no_interval_and_a_missed_target_no_gain() -> None:
    rows = gains([_run("static-8", 1, 100.0), _run("copus", 1, None), _run("goodput", 1, 120.0)])
    by_policy = {row["policy"]: row for row in rows}
    assert by_policy["goodput"]["low"] is None
    assert by_policy["goodput"]["gain_over_best_fixed_pct"] == pytest.approx(100 * (100 / 120 - 1))
    assert "copus" not in by_policy
    assert gains([_run("copus", 1, 3.0)]) == []


def test_runs_of_two_workloads_or_neighbours_are_not_compared() -> None:
    quiet, busy = (
        {**_run("static-8", 1, seconds), "neighbour": name} for name, seconds in (("quiet", 10.0), ("busy", 20.0))
    )
    rows = gains([quiet, busy, {**_run("goodput", 1, 16.0), "neighbour": "busy"}])
    assert {(row["neighbour"], row["policy"]): round(row["gain_over_best_fixed_pct"]) for row in rows} == {
        ("quiet", "static-8"): 0,
        ("busy", "static-8"): 0,
        ("busy", "goodput"): 25,
    }


def test_with_a_decay_times_are_compared_at_one_final_loss() -> None:
    """In truth losses fall by 0.5 when the time doubles, and `goodput` takes 20 % less time to any loss. It ends where
    its tokens end: at another loss and another time than the fixed one."""
    rng = np.random.default_rng(0)
    runs = []
    for seed in range(1, 9):
        for policy, share, farther in (("static-8", 1.0, 1.0), ("goodput", 0.8, 0.7)):
            effort = (1.0 if seed % 2 else 1.5) * farther  # what its tokens are worth
            loss = 6 - 0.5 * math.log2(effort) + 0.002 * rng.standard_normal()
            end = {"final_loss": loss, "target_loss": None, "tokens": 100 if seed % 2 else 150}
            runs.append({**_run(policy, seed, 100 * share * effort), **end})
    assert loss_slope(runs) == pytest.approx(-math.log(2) / 0.5, rel=0.02)
    row = next(row for row in gains(runs) if row["policy"] == "goodput")
    assert row["gain_over_best_fixed_pct"] == pytest.approx(25, abs=1)
    raw = next(run["seconds"] for run in runs if run["policy"] == "goodput")
    assert raw == pytest.approx(56)  # by the clock alone it would have gained 79 %
    one_length = [run for run in runs if run["seed"] % 2]
    assert loss_slope(one_length) is None
    assert at_equal_loss(one_length) == [run["seconds"] for run in one_length]


def test_evaluations_are_the_benchmarks_time_and_not_the_jobs() -> None:
    def evaluate(time: float, seconds: float) -> Evaluate:
        return Evaluate(step=0, samples_consumed=0, time=time, loss=1.0, sequences=1, seconds=seconds)

    seconds = [seconds for seconds, _ in without_evaluations([evaluate(12.0, 2.0), evaluate(30.0, 3.0)], began=10.0)]
    assert seconds == [0.0, 15.0]


def test_the_neighbour_goes_when_the_run_has_ended() -> None:
    with busy_neighbour(1) as process:
        assert process.poll() is None
    assert process.poll() is not None


def test_every_contender_is_a_job_and_schedules_are_told_what_is_fast(tmp_path: Path) -> None:
    fastest = {4: Configuration(layout=Layout(tp=2), micro_batch=4, global_batch=4)}
    fastest |= {batch: Configuration(layout=Layout(dp=2), micro_batch=4, global_batch=batch) for batch in (8, 16)}
    table = tmp_path / "throughput.jsonl"
    every = contenders(fastest, table)
    by_name = {one.name: one.settings for one in every}
    names = ["static-4", "static-8", "static-16", "ramp", "seesaw", "goodput-table", "goodput", "copus"]
    assert list(by_name)[:8] == names
    for name, settings in by_name.items():
        job = load_job(time_to_target.JOB, [f"{key}={value}" for key, value in settings.items()])
        assert job.planner.policy == name.split("-")[0]
    assert {one.name for one in every if one.rows == table} == {"ramp", "seesaw", "goodput-table"}
    ramp = by_name["ramp"]
    assert (ramp["training.global_batch"], ramp["planner.max_global_batch"]) == (2, 16)


def test_cells_differ_in_decay_length_and_target() -> None:
    end, stop = (Cell("short-sequences", decay, "quiet").settings(1, 1.0) for decay in DECAYS)
    assert (end["training.decay"], end["training.target_loss"]) == ("cosine", "null")
    assert end["training.tokens"] < Cell("short-sequences", "cosine", "quiet").settings(2, 1.0)["training.tokens"]
    assert stop["training.target_loss"] == 5.5
    for name in WORKLOADS:  # each is a job
        for decay in DECAYS:
            settings = Cell(name, decay, "quiet").settings(1, 1.0)
            assert load_job(time_to_target.JOB, [f"{key}={value}" for key, value in settings.items()])


def test_the_fixed_batches_run_in_what_was_measured_to_be_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slower than the cost model says of all that was not measured."""
    job = load_job(time_to_target.JOB)
    fingerprint = Fingerprint(
        model=job.model.digest, precision="fp32", backend="b", hardware="2 × a core", software="s"
    )
    slow, fast = (Configuration(layout=Layout(dp=2), micro_batch=each, global_batch=16) for each in (4, 8))
    for configuration, seconds in ((slow, 1001.0), (fast, 1000.0)):
        row = {"configuration": configuration, "step_seconds": seconds, "spread_seconds": 0.1, "count": 3, "time": 1.0}
        ThroughputTable(tmp_path / "throughput.jsonl").add(Measurement(fingerprint=fingerprint, model=job.model, **row))
    monkeypatch.setattr(time_to_target, "copus_output", lambda *arguments: "")
    assert fastest_of(time_to_target.JOB, {}, [16], tmp_path) == {16: fast}
    with pytest.raises(SystemExit, match="nothing was measured at a global batch of 12"):
        fastest_of(time_to_target.JOB, {}, [12], tmp_path)
