"""What is measured next: informative rows first, and in the end what decides the choice."""

import numpy as np
import pytest
from test_cost_model import CLUSTER, MODEL, SPACE

from profiles.configurations import Configurations
from profiles.cost import CostModel, Timings
from profiles.cost.select import next_to_measure, select
from profiles.cost.verify import gains

FEW = Configurations.of([SPACE[place] for place in range(0, len(SPACE), max(len(SPACE) // 60, 1))])
NOTHING = np.full(len(FEW), np.nan)


def predicted(cost: CostModel | None = None) -> np.ndarray:
    return (cost or CostModel()).predict(MODEL, CLUSTER, FEW, "bf16", coverage=None).seconds


def fitted(rows: list[int], truth: np.ndarray) -> tuple[CostModel, np.ndarray]:
    """A model that knows these rows, and what was measured."""
    measured = NOTHING.copy()
    measured[rows] = truth[rows]
    return CostModel().fit([Timings(MODEL, CLUSTER, "bf16", FEW.take(np.array(rows)), truth[rows])]), measured


def chosen(seconds: np.ndarray, measured: np.ndarray) -> dict[int, int]:
    """The place of the fastest of each batch."""
    expected = np.where(np.isfinite(measured), measured, seconds)
    places = {int(b): np.flatnonzero(FEW.global_batch == b) for b in np.unique(FEW.global_batch)}
    return {b: int(each[np.argmin(expected[each])]) for b, each in places.items()}


def test_gains_are_what_many_draws_say() -> None:
    """Draw what a measurement says, update by the rules for normal distributions, choose, and average."""
    cost, measured = fitted([0, 7], 1.1 * predicted())
    found = gains(cost, MODEL, CLUSTER, FEW, "bf16", measured)
    errors = cost.errors(MODEL, CLUSTER, FEW, "bf16")
    covariance, noise = errors.spread**2 * errors.covariance(), errors.spread * errors.how.noise_sd
    expected = np.log(np.where(np.isfinite(measured), measured, predicted(cost)))
    rng = np.random.default_rng(0)
    draws = rng.standard_normal(20_000)
    for place in np.argsort(-found)[[0, 1, 5]].tolist():
        move = covariance[:, place] / np.sqrt(covariance[place, place] + noise**2)
        move[[0, 7]] = 0.0
        after = expected[:, None] + move[:, None] * draws
        batches = [np.flatnonzero(FEW.global_batch == b) for b in np.unique(FEW.global_batch)]
        gain = np.mean([expected[b].min() - after[b].min(0).mean() for b in batches if len(b) > 1])
        assert found[place] == pytest.approx(gain, rel=0.2), "nine points of a function with kinks"


def test_nothing_is_gained_by_what_is_measured_nor_where_all_is() -> None:
    truth = predicted()
    cost, measured = fitted([3, 4], truth)
    found = gains(cost, MODEL, CLUSTER, FEW, "bf16", measured)
    assert (found >= -1e-12).all()
    assert found[3] == found[4] == 0
    assert found.max() > 0
    assert not gains(cost, MODEL, CLUSTER, FEW, "bf16", truth).any()


def test_the_last_row_finds_out_that_what_looks_fastest_is_not() -> None:
    truth = predicted()
    trap = chosen(truth, NOTHING)[int(FEW.global_batch[0])]
    rows = [place for place in select(CostModel(), MODEL, CLUSTER, FEW, "bf16", 6).tolist() if place != trap][:4]
    truth = truth.copy()
    truth[trap] *= 2
    one = FEW.global_batch == FEW.global_batch[trap]
    cost, measured = fitted(rows, truth)
    assert chosen(predicted(cost), measured)[int(FEW.global_batch[trap])] == trap
    gained = gains(cost, MODEL, CLUSTER, FEW, "bf16", measured, may=one)
    last = next_to_measure(cost, MODEL, CLUSTER, FEW, "bf16", measured, left=1, may=one)
    assert last == np.argmax(gained)
    assert gained[trap] > np.median(gained[one])
    cost, measured = fitted([*rows, trap], truth)
    assert chosen(predicted(cost), measured)[int(FEW.global_batch[trap])] != trap, "a measured time stays"


def test_what_may_not_be_chosen_is_no_reason_to_measure() -> None:
    cost, measured = fitted([0], predicted())
    nowhere = np.zeros(len(FEW), dtype=bool)
    assert not gains(cost, MODEL, CLUSTER, FEW, "bf16", measured, may=nowhere).any()


def test_rows_are_informative_before_the_last_and_none_is_repeated() -> None:
    truth, rows = 1.2 * predicted(), list[int]()
    for left in range(6, 0, -1):
        cost, measured = fitted(rows, truth) if rows else (CostModel(), NOTHING)
        place = next_to_measure(cost, MODEL, CLUSTER, FEW, "bf16", measured, left)
        if left > 1:
            assert [place] == select(cost, MODEL, CLUSTER, FEW, "bf16", 1, leave_out=rows).tolist()
        assert place not in rows
        rows.append(place)
    assert next_to_measure(CostModel(), MODEL, CLUSTER, FEW, "bf16", truth, 1) == -1


def test_of_many_the_fastest_looking_are_weighed() -> None:
    many = SPACE.take(np.resize(np.arange(len(SPACE)), 3000))
    found = gains(CostModel(), MODEL, CLUSTER, many, "bf16", np.full(len(many), np.nan))
    assert len(found) == len(many)
    assert found.max() > 0
