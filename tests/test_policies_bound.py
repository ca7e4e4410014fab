"""What no rule can do that is not told c: the linear programme, on games whose answer is known."""

import numpy as np
import pytest

from benchmarks.policies_bound import Game, measure
from planner.menu import Menu
from profiles.configuration import Configuration
from profiles.layout import Layout

RIGHT = np.array([0.0, 1.0, 0.0])


def game(by_phi: list[list[float]]) -> Game:
    """Two stretches that are alike; `by_phi` are the seconds of the two configurations for each φ."""
    seconds = np.repeat(np.array(by_phi)[:, None, :], 2, axis=1)
    return Game(seconds, np.zeros((2, 2)), np.zeros((2, 2)))


def test_what_one_schedule_cannot_do_for_two_critical_batches() -> None:
    """Each configuration is the best for one φ, and a fifth slower for another: half of each is a tenth slower."""
    opposed = game([[0.5, 0.6], [0.5, 0.5], [0.6, 0.5]])
    assert opposed.best(RIGHT, np.full(3, -100 / 11 + 0.01)) is None
    shared = opposed.best(RIGHT, np.full(3, -100 / 11 - 0.01))
    assert shared is not None
    assert shared == pytest.approx([-100 / 11, 0.0, -100 / 11], abs=0.02)


def test_without_a_limit_it_is_the_best_for_the_weights() -> None:
    free = game([[0.5, 0.6], [0.5, 0.4], [0.6, 0.5]])
    for weights, expected in ((RIGHT, [-100 / 6, 25.0, 0.0]), (np.array([1.0, 0.0, 0.0]), [0.0, 0.0, -100 / 6])):
        gains = free.best(weights, np.full(3, -50.0))
        assert gains is not None
        assert gains == pytest.approx(expected, abs=1e-6)


def test_an_adaptive_schedule_gains_where_the_batch_that_pays_grows() -> None:
    configurations = [
        Configuration(layout=Layout(dp=1), micro_batch=1, global_batch=batch) for batch in (1, 4, 16, 64, 256)
    ]
    menu = Menu.of(configurations)
    batch = menu.global_batch
    found = measure({"affine": (menu, batch / (1 + 0.05 * batch))})
    goodput, copus = found["goodput, φ known but for c"], found["copus, φ known but for c"]
    safe = found["at most 0.5 % slower than fixed, best for c right"]
    assert goodput["cases"] == 9
    assert goodput["mean_gain_pct"]["c right"] > 1
    assert safe["possible"] == 9
    assert safe["worst_gain_pct"] >= -0.5 - 1e-4
    assert safe["mean_gain_pct"]["c right"] <= goodput["mean_gain_pct"]["c right"] + 1e-6
    assert copus["mean_gain_pct"]["c right"] < goodput["mean_gain_pct"]["c right"]
