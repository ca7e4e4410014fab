"""The whole-run plan against brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner_decision import DP2, TP2, of

from planner.menu import Menu, rung_of
from planner.plan import plan_run
from planner.simulator.trajectory import geometric

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
