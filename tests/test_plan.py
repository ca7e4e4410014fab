"""The whole-run plan against brute force, and the outlook against laws that are known."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner_decision import DP2, TP2, of

from planner.menu import Menu, rung_of
from planner.outlook import Outlook, log_error
from planner.plan import plan_run
from planner.simulator.trajectory import geometric, grid, linear, power

MENU = Menu.of([of(DP2, 1, 4), of(DP2, 2, 4), of(DP2, 1, 16), of(TP2, 1, 16)])
PLACE = {"batch": 0, "micro-batch": 1, "layout": 2}


@settings(max_examples=40, deadline=None)
@given(
    speeds=st.lists(st.floats(1.0, 100.0), min_size=4, max_size=4),
    phi=st.lists(st.floats(0.5, 500.0), min_size=4, max_size=4),
    costs=st.lists(st.floats(0.0, 20.0), min_size=3, max_size=3).map(sorted),
    start=st.sampled_from([None, 0, 3]),
    objective=st.sampled_from(["plain", "lr-aware"]),
)
def test_the_plan_is_the_best_of_all_paths(speeds, phi, costs, start, objective):
    plan = plan_run(MENU, np.array(speeds), np.array(phi), 1000.0, np.array(costs), objective, start)

    def seconds(path):
        total, before = 0.0, start
        for k, index in enumerate(path):
            c = MENU.configurations[index]
            if before is not None and before != index:
                total += costs[PLACE[rung_of(MENU.configurations[before], c)]]
            worth = c.global_batch**0.5 if objective == "lr-aware" else 1.0
            total += 250.0 * (1 + c.global_batch / phi[k]) / worth / speeds[index]
            before = index
        return total

    assert plan.seconds == pytest.approx(min(map(seconds, product(range(4), repeat=4))), rel=1e-9)
    walked = [s.index for s in plan.schedule for _ in range(round((s.last - s.first) * 4))]
    assert seconds(walked) == pytest.approx(plan.seconds, rel=1e-9)
    assert sum(s.seconds for s in plan.schedule) == pytest.approx(plan.seconds, rel=1e-9)
    if start is None:
        assert plan.fixed_seconds == pytest.approx(min(seconds([i] * 4) for i in range(4)), rel=1e-9)
        assert plan.gain >= -1e-12


def test_dear_moves_are_not_planned_and_free_ones_follow():
    speeds = np.array([100.0, 90.0, 200.0, 180.0])
    phi = geometric(2.0, 200.0)
    free = plan_run(MENU, speeds, phi, 1e4, np.zeros(3))
    assert [s.index for s in free.schedule] == [0, 2]
    assert free.gain > 0.01
    dear = plan_run(MENU, speeds, phi, 1e4, np.full(3, 1e9))
    assert [s.index for s in dear.schedule] == [dear.fixed_index]
    assert dear.gain == pytest.approx(0)


LAWS = {"geometric": geometric(2.0, 64.0), "linear": linear(2.0, 64.0), "power": power(2.0, 64.0)}


@pytest.mark.parametrize("law", LAWS)
def test_the_outlook_follows_any_law_under_30_percent_noise(law):
    """300 runs of 200 estimates: the level is right to 15 %, and its interval says so."""
    rng, runs = np.random.default_rng(3), 300
    outlook = Outlook.unknown(np.full(runs, 200.0))
    for n in range(1, 200):
        truth = np.log(np.interp(n / 200, grid(), LAWS[law]))
        outlook.observe(np.full(runs, float(n)), np.exp(truth + 0.3 * rng.normal(size=runs)), np.full(runs, 0.3))
        if n in (40, 100, 190):
            here = np.full(runs, float(n))
            error = np.log(outlook.at(here)) - truth
            said = np.log(outlook.at(here, 1.0) / outlook.at(here))
            assert abs(error.mean()) < 0.15
            assert error.std() < 0.13
            assert 0.7 < said.mean() / error.std() < 2.0
    ahead = np.log(outlook.at(np.full((runs, 1), 220.0), 1.0) / outlook.at(np.full((runs, 1), 220.0)))
    assert (ahead[:, 0] > said).all(), "farther on less is known"


def test_the_outlook_before_it_has_seen_much():
    outlook = Outlook.unknown(np.array([1000.0]))
    outlook.observe(np.array([1.0]), np.array([10.0]), np.array([0.3]))
    assert outlook.at(np.array([1.0])) == pytest.approx(10.0)
    assert outlook.exponent == pytest.approx(0.5), "the prior"
    low, middle, high = (float(outlook.at(np.array([1000.0]), s)[0]) for s in (-1.0, 0.0, 1.0))
    assert low < 10.0 < middle < high
    assert low > 5.0, "noise scales do not fall: a level that is one error lower, and no growth"


def test_an_estimate_that_repeats_itself_teaches_less():
    once, often = Outlook.unknown(np.array([1000.0])), Outlook.unknown(np.array([1000.0]))
    for n in range(20):
        once.observe(np.array([100.0 + n]), np.array([10.0]), np.array([0.3]), 0.1)
        often.observe(np.array([100.0 + n]), np.array([10.0]), np.array([0.3]), 1.0)
    here = np.array([119.0])
    assert once.at(here, 1.0) > 1.1 * often.at(here, 1.0)


def test_the_outlook_survives_a_checkpoint():
    first, resumed = Outlook.unknown(np.array([1000.0])), Outlook.unknown(np.array([1.0]))
    for n in (10.0, 20.0, 40.0):
        first.observe(np.array([n]), np.array([n]), np.array([0.2]))
    resumed.restore(first.state())
    resumed.restore({})
    assert resumed.at(np.array([500.0]), 1.0) == first.at(np.array([500.0]), 1.0)


def test_log_error_of_intervals():
    assert log_error(10.0, 10.0 / 1.645, 10.0 * 1.645) == pytest.approx(np.log(1.645) / 1.645)
    assert log_error(10.0, None, 20.0) == log_error(10.0, 5.0, None) == pytest.approx(np.log(2))
