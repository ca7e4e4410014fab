"""What the benchmark of real runs makes of their events: where a curve crosses, and who was sooner."""

import math

import pytest

from benchmarks.time_to_target import crossing, gains


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
