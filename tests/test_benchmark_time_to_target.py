"""What the benchmark of real runs makes of their events: where a curve crosses, and who was sooner."""

import math
from pathlib import Path

import pytest

from benchmarks import time_to_target
from benchmarks.time_to_target import crossing, fastest_of, gains
from copus.job import load_job
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.table import ThroughputTable


def _run(policy: str, seed: int, seconds: float | None, profile: float = 0.0) -> dict[str, object]:
    whole = None if seconds is None else seconds + profile
    return {"policy": policy, "seed": seed, "seconds": whole, "training_seconds": seconds}


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
    ]
    runs += [_run("goodput", 1, 80.0, profile=20.0), _run("goodput", 2, 100.0, profile=20.0)]
    with_profiling, without = gains(runs, "seconds"), gains(runs, "training_seconds")
    assert with_profiling["static-32"]["gain_pct"] == pytest.approx(0)
    assert with_profiling["goodput"]["gain_pct"] == pytest.approx(100 * (math.sqrt(100 / 100 * 100 / 120) - 1))
    assert without["goodput"]["gain_pct"] == pytest.approx(100 * (math.sqrt(100 / 80) - 1))
    low, high = without["goodput"]["low_pct"], without["goodput"]["high_pct"]
    assert low is not None
    assert high is not None
    assert low < without["goodput"]["gain_pct"] < high


def test_one_seed_has_no_interval_and_a_missed_target_no_gain() -> None:
    found = gains([_run("static-8", 1, 100.0), _run("copus", 1, None), _run("goodput", 1, 120.0)], "seconds")
    assert found["goodput"]["low_pct"] is None
    assert found["goodput"]["gain_pct"] == pytest.approx(100 * (100 / 120 - 1))
    assert "copus" not in found
    assert gains([_run("copus", 1, 3.0)], "seconds") == {}


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
    monkeypatch.setattr(time_to_target, "_copus", lambda *arguments: "")
    assert fastest_of(time_to_target.JOB, [], [16], tmp_path) == {16: fast}
    with pytest.raises(SystemExit, match="nothing was measured at a global batch of 12"):
        fastest_of(time_to_target.JOB, [], [12], tmp_path)
