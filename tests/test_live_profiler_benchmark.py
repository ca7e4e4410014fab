"""What `benchmarks.live_profiler` calls the same ranking, and what it measures."""

import numpy as np
import pytest
from test_profiles_table import HERE, MODEL

from benchmarks.live_profiler import RANKS, compare, configurations, make_job, repeatability
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Measurement

LAYOUTS = [Layout(dp=4), Layout(tp=2, dp=2), Layout(tp=4), Layout(pp=2, tp=2)]


def rows(*seconds: float | None, spread: float = 0.01) -> list[Measurement]:
    return [
        Measurement(
            fingerprint=HERE,
            model=MODEL,
            configuration=Configuration(layout=layout, micro_batch=1, global_batch=8),
            step_seconds=value,
            spread_seconds=None if value is None else spread,
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


def test_a_pair_that_noise_cannot_tell_apart_does_not_count() -> None:
    assert compare(rows(1.0, 2.0, 3.0, 3.004), rows(1.0, 2.0, 3.004, 3.0))["same_ranking"]


def test_a_pair_that_the_machine_does_not_repeat_does_not_count() -> None:
    one, other = rows(1.0, 2.0, 3.0, 3.3), rows(1.0, 2.0, 3.3, 3.0)
    assert not compare(one, other)["same_ranking"]
    found = compare(one, other, visit_sd=0.05)
    assert found["same_ranking"]
    assert (found["pairs"], found["pairs_decided"], found["pairs_agreeing"]) == (6, 5, 5)


def test_a_machine_that_repeats_little_cannot_rank() -> None:
    found = compare(rows(1.0, 1.1, 1.2, 1.3), rows(1.0, 1.1, 1.2, 1.3), visit_sd=0.5)
    assert found["pairs_decided"] == 0
    assert not found["same_ranking"]


def test_repeatability_is_what_visits_differ_by_beyond_their_steps() -> None:
    true, visit_sd, spread, rng = 2.0, 0.06, 0.05, np.random.default_rng(3)
    step_sd = visit_sd * true, 1.25 / 1.28 * spread / np.sqrt(5)
    first, again = (true + rng.normal(0, np.hypot(*step_sd), 4000) for _ in range(2))
    found = repeatability(
        *([row for value in times for row in rows(float(value), spread=spread)] for times in (first, again))
    )
    assert found == pytest.approx(visit_sd, rel=0.05)


def test_a_machine_that_is_slower_as_a_whole_repeats_itself() -> None:
    assert repeatability(rows(1.0, 2.0, 3.0), rows(1.2, 2.4, 3.6)) == 0
    assert repeatability(rows(1.0, 2.0, None), rows(1.5, None, 3.0)) == 0


def test_noise_alone_is_no_ranking() -> None:
    found = compare(rows(1.0, 1.1, 1.2, spread=1.0), rows(1.0, 1.1, 1.2, spread=1.0))
    assert found["pairs_decided"] == 0
    assert not found["same_ranking"]


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
