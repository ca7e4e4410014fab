"""What is measured next, and when the ranking is settled: driven by machines whose true times are known."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_profiles_table import HERE, MODEL

from planner.config import PlannerConfig
from planner.last_measurement import last_measurement
from planner.predictor import Predictor
from planner.ranking import contested, next_round
from planner.space import candidates
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Measurement
from profiles.throughput import Throughput

START = Configuration(layout=Layout(tp=2), micro_batch=1, global_batch=4)
CONFIG = PlannerConfig(min_global_batch=4, max_global_batch=64, max_micro_batch=4)
MACHINE = Cluster(accelerators_per_node=2)
SPACE = candidates(CONFIG, MODEL, MACHINE, START)


def row(configuration, seconds, spread=0.0, failure=None, time=1.0):
    return Measurement(
        fingerprint=HERE,
        model=MODEL,
        configuration=configuration,
        step_seconds=None if failure else seconds,
        spread_seconds=None if failure else spread,
        count=0 if failure else 3,
        failure=failure,
        time=time,
    )


def true_seconds(configuration, rates):
    """A step that is affine in the micro-batches; every layout has its own fixed part and its own rate."""
    fixed, per_sequence = rates[configuration.layout]
    return fixed + configuration.global_batch * (per_sequence + 0.002 / configuration.micro_batch)


def profile(rates, noise, seed=0, rounds=5, within=0.02, memory=None):
    """Measure until nothing is asked for any more. The rows, and how often each configuration was measured."""
    drawn, rows, times = random.Random(seed), [], Counter()
    while wanted := next_round(SPACE, rows, START, rounds, within):
        for configuration in wanted:
            times[configuration] += 1
            assert times[configuration] <= rounds
            failed = memory is not None and configuration.micro_batch > memory
            seconds = true_seconds(configuration, rates) * drawn.lognormvariate(0, noise)
            failure = "out of memory" if failed else None
            rows.append(row(configuration, seconds, noise * seconds, failure, time=float(len(rows))))
            if failed:
                break
    return rows, times


def layouts():
    return list(dict.fromkeys(each.layout for each in SPACE))


def test_layouts_that_lie_far_apart_are_measured_once():
    rates = {layout: (0.01, 0.01 * 4**place) for place, layout in enumerate(layouts())}
    rows, times = profile(rates, noise=0.001)
    fastest = layouts()[0]
    assert {times[each] for each in times if each.layout != fastest} == {1}
    assert all(Throughput(rows).predict(each) for each in SPACE)


def test_layouts_that_lie_together_are_measured_until_they_are_told_apart_or_rounds_are_used_up():
    rates = dict.fromkeys(layouts(), (0.01, 0.01))
    _, times = profile(rates, noise=0.2, rounds=4)
    assert max(times.values()) == 4
    assert len({each.layout for each, number in times.items() if number == 4}) == len(layouts())


def test_equal_layouts_of_a_quiet_machine_are_settled_early():
    """Once two rounds agree to 0.1 %, nothing is to be gained above `within`."""
    rates = dict.fromkeys(layouts(), (0.01, 0.01))
    _, times = profile(rates, noise=0.001, rounds=10)
    assert max(times.values()) <= 3


@given(st.integers(0, 2**32 - 1))
def test_the_fastest_is_found_within_what_noise_allows(seed):
    drawn = random.Random(seed)
    rates = {layout: (drawn.uniform(0, 0.05), drawn.uniform(0.005, 0.05)) for layout in layouts()}
    rows, _ = profile(rates, noise=0.01, seed=seed)
    known = Throughput(rows)
    for batch in {each.global_batch for each in SPACE}:
        same = [each for each in SPACE if each.global_batch == batch]
        chosen = min(same, key=lambda each: known.predict(each).step_seconds)
        best = min(true_seconds(each, rates) for each in same)
        assert true_seconds(chosen, rates) < 1.08 * best


def test_what_needs_more_memory_than_what_failed_is_not_tried():
    rates = dict.fromkeys(layouts(), (0.01, 0.01))
    rows, times = profile(rates, noise=0.001, memory=1)
    failed = [each for each in times if each.micro_batch > 1]
    assert {each.layout for each in failed} == set(layouts())
    assert {each.micro_batch for each in failed} == {2}
    known = Throughput(rows)
    for each in SPACE:
        prediction = known.predict(each)
        if each.micro_batch == 4:
            assert prediction is not None
            assert prediction.failure == "out of memory"


def test_what_could_cost_most_comes_first():
    slow, near, fast = (Configuration(layout=layout, micro_batch=1, global_batch=4) for layout in layouts()[:3])
    rows = [row(fast, 1.0, 0.01), row(near, 1.05, 0.01), row(slow, 1.15, 0.01)]
    assert contested([slow, near, fast], rows, 0.02)[:2] in ([fast, near], [near, fast])
    far = [row(fast, 1.0, 0.01), row(near, 1.5, 0.01), row(slow, 9.0, 0.01)]
    assert contested([slow, near, fast], far, 0.02) == []


def test_left_out_is_left_out():
    wanted = next_round(SPACE, [], START, 3, 0.02)
    assert next_round(SPACE, [], START, 3, 0.02, wanted[:2]) == wanted[2:]


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_table_that_was_made_in_part_goes_on_where_it_was(rounds):
    rates = {layout: (0.01, 0.01 * (1 + 0.01 * place)) for place, layout in enumerate(layouts())}
    whole, _ = profile(rates, noise=0.05, rounds=rounds)
    for cut in (1, len(whole) // 2, len(whole) - 1):
        assert next_round(SPACE, whole[:cut], START, rounds, 0.02)[0] == whole[cut].configuration
    assert next_round(SPACE, whole, START, rounds, 0.02) == []


def test_the_last_measurement_is_one_that_may_change_the_choice():
    rates = {layout: (0.1, 0.01) for layout in {each.layout for each in SPACE}}
    order = next_round(SPACE, [], START, 1, 0.02)
    rows = [row(each, true_seconds(each, rates)) for each in order]

    def last(measured, leave_out=()):
        return last_measurement(Predictor.from_rows(CONFIG, MODEL, MACHINE, "fp32", START, measured), leave_out)

    assert last([]) is None
    assert last(rows) is None, "the table knows all"
    first = last(rows[:3])
    assert first in SPACE
    assert first not in order[:3]
    assert last(rows[:3], {first}) not in {first, *order[:3]}
    assert last([*rows[:3], row(first, None, failure="out of memory", time=2.0)]) != first
