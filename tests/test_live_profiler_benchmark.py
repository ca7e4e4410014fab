"""What `benchmarks.live_profiler` calls the same ranking, and what it measures."""

import numpy as np
import pytest
from test_profiles_table import HERE, MODEL

from benchmarks.live_profiler import RANKS, compare, configurations, make_job, repeatability, together
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Measurement

LAYOUTS = [Layout(dp=4), Layout(tp=2, dp=2), Layout(tp=4), Layout(pp=2, tp=2)]


def rows(*seconds: float | None) -> list[Measurement]:
    return [
        Measurement(
            fingerprint=HERE,
            model=MODEL,
            configuration=Configuration(layout=layout, micro_batch=1, global_batch=8),
            step_seconds=value,
            spread_seconds=None if value is None else 0.01,
            count=0 if value is None else 5,
            failure="out of memory" if value is None else None,
            time=0.0,
        )
        for layout, value in zip(LAYOUTS, seconds, strict=False)
    ]


def test_the_same_order_is_the_same_ranking() -> None:
    found = compare(rows(1.0, 2.0, 3.0, 4.0), rows(1.2, 2.5, 2.8, 9.0))
    assert found["same_ranking"]
    assert (found["pairs"], found["pairs_decided"], found["pairs_agreeing"]) == (6, 6, 6)
    assert found["kendall_tau"] == 1
    assert found["regret_pct"] == 0


def test_a_pair_the_other_way_round_is_another_ranking() -> None:
    found = compare(rows(1.0, 2.0, 3.0, 4.0), rows(1.0, 2.0, 4.0, 3.0))
    assert not found["same_ranking"]
    assert (found["pairs_decided"], found["pairs_agreeing"]) == (6, 5)
    assert found["kendall_tau"] == pytest.approx(4 / 6)


def test_a_pair_that_the_machine_does_not_repeat_does_not_count() -> None:
    one, other = rows(1.0, 2.0, 3.0, 3.3), rows(1.0, 2.0, 3.3, 3.0)
    assert not compare(one, other)["same_ranking"]
    for deviations in ((0.05, 0.0), (0.0, 0.05)):  # it is enough that one of them cannot tell
        found = compare(one, other, deviations)
        assert found["same_ranking"]
        assert (found["pairs"], found["pairs_decided"], found["pairs_agreeing"]) == (6, 5, 5)


def test_a_machine_that_repeats_little_cannot_rank() -> None:
    found = compare(rows(1.0, 1.1, 1.2, 1.3), rows(1.0, 1.1, 1.2, 1.3), (0.5, 0.5))
    assert found["pairs_decided"] == 0
    assert not found["same_ranking"]


def test_slower_for_all_is_told_from_slower_for_some() -> None:
    found = compare(rows(1.0, 2.0, 4.0), rows(1.1, 2.2, 4.4))
    assert (found["slower_pct"], found["scatter_pct"]) == (pytest.approx(10), pytest.approx(0, abs=1e-6))
    assert compare(rows(1.0, 2.0, 4.0), rows(1.0, 2.0, 5.0))["scatter_pct"] > 10


def test_the_mean_of_both_times_is_geometric_and_a_failure_stays_one() -> None:
    found = together(rows(1.0, 2.0, None, 3.0), rows(4.0, 2.0, 1.0, None))
    assert [row.step_seconds for row in found] == [2.0, 2.0, None, None]
    assert [bool(row.failure) for row in found] == [False, False, True, True]


@pytest.mark.parametrize("steps", [3, 5])
def test_repeatability_is_what_medians_differ_by(steps: int) -> None:
    """Of medians of few steps on a machine that is faster or slower at each visit, and slower as a whole later on."""
    rng, visit_sd, step_sd = np.random.default_rng(3), 0.06, 0.05

    def medians(speed: float) -> list[float]:
        visits = speed * np.exp(visit_sd * rng.standard_normal((4000, 1)))
        found: list[float] = np.median(visits * np.exp(step_sd * rng.standard_normal((4000, steps))), axis=1).tolist()
        return found

    first, again, once_more = (medians(speed) for speed in (1.0, 1.3, 1.0))
    found = repeatability(*([row for value in times for row in rows(value)] for times in (first, again)))
    assert found == pytest.approx(float(np.std(np.log(once_more))), rel=0.05)


def test_a_machine_that_is_slower_as_a_whole_repeats_itself() -> None:
    assert repeatability(rows(1.0, 2.0, 3.0), rows(1.2, 2.4, 3.6)) == pytest.approx(0, abs=1e-9)
    assert repeatability(rows(1.0, 2.0, None), rows(1.5, None, 3.0)) == 0


def test_another_fastest_costs_what_it_costs() -> None:
    found = compare(rows(1.0, 2.0, 9.0, 9.5), rows(1.1, 1.0, 9.0, 9.5))
    assert not found["same_ranking"]
    assert found["regret_pct"] == pytest.approx(10)


def test_other_failures_are_another_ranking() -> None:
    assert not compare(rows(1.0, 2.0, None, 4.0), rows(1.0, 2.0, 3.0, 4.0))["same_ranking"]


def test_every_feasible_configuration_of_the_demo_is_measured() -> None:
    job = make_job(8)
    wanted = configurations(job, quick=False)
    assert len(wanted) == len(set(wanted)) == 27
    for each in wanted:
        each.layout.check(job.model, job.cluster)
        assert each.layout.accelerators == RANKS
    assert len(configurations(job, quick=True)) == 3
