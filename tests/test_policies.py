"""Every policy, and above all the properties of our rule."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_situations import JOB, situation_of
from test_planner_decision import CONFIG, DP2, START, TP2, noise, of, planner

from planner.config import PlannerConfig
from planner.forecast import QUANTILE_90, CriticalBatchForecast
from planner.move_costs import expected_layout_seconds
from planner.outlook import look_ahead
from planner.policies.cbs import CriticalBatch, CriticalBatchDoubling
from planner.policies.goodput import Goodput, reservation_value, worth_trying
from planner.policies.policy import Copus, make_policy
from planner.policies.schedules import LateSwitch, Ramp, Seesaw
from planner.situation import Choice
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.model_shape import ModelShape

BATCHES = (2, 4, 8, 16, 32, 64)
SMALL = of(TP2, 1, 4)
TABLE = {of(DP2, 1, b): 100 * b / (b + 20.0) for b in BATCHES} | {of(TP2, 1, b): 60 * b / (b + 4.0) for b in BATCHES}
"""Samples a second: tensor parallelism is faster at small batches, data parallelism at large ones."""

positive = st.floats(1e-3, 1e3)
tables = st.lists(positive, min_size=len(TABLE), max_size=len(TABLE)).map(lambda v: dict(zip(TABLE, v, strict=True)))


def chosen(policy, now) -> Configuration:
    return now.menu.configurations[int(policy.choose(now).index[0])]


@given(table=tables, phi=st.floats(0.1, 1e4), factor=st.floats(1.0, 100.0))
def test_more_noise_never_means_a_smaller_batch(table, phi, factor):
    """Plain goodput, a fixed table, free moves: T/(1 + B/φ) has increasing differences in (B, φ)."""
    batches = []
    for value in (phi, phi * factor):
        now = situation_of(table, SMALL, value)
        batches.append(chosen(Copus(0.0), now).global_batch)
    assert batches[0] <= batches[1]


@given(phi=st.floats(0.5, 500), factor=st.floats(1.0, 50.0))
def test_more_noise_never_means_a_smaller_batch_with_our_rule(phi, factor):
    less, more = (chosen(Goodput(), situation_of(TABLE, SMALL, v, error=0.02)) for v in (phi, phi * factor))
    assert less.global_batch <= more.global_batch


@given(phi=st.floats(0.1, 1e4), cost=st.floats(0, 1e3), objective=st.sampled_from(["plain", "lr-aware"]))
def test_zero_gain_means_no_move(phi, cost, objective):
    equal = {c: 10.0 for c in (of(DP2, 1, 8), of(TP2, 1, 8), of(TP2, 2, 8))}
    now = situation_of(equal, of(TP2, 1, 8), phi, moves=(0, 0, cost), objective=objective)
    for policy in (Goodput(), Copus(0.0)):
        assert policy.choose(now).index[0] == now.current[0]


@settings(max_examples=50)
@given(table=tables, phi=st.floats(0.1, 1e4), cost=st.floats(0, 1e4), slower=st.floats(0.1, 0.99))
def test_a_dominated_configuration_is_never_chosen(table, phi, cost, slower):
    """The twin has the batch and the layout of another, and is slower."""
    twins = {of(c.layout, 2, c.global_batch): slower * v for c, v in table.items() if c.global_batch >= 4}
    now = situation_of(table | twins, SMALL, phi, moves=(0, 0, cost))
    for policy in (Goodput(), Copus(0.0), CriticalBatch("optimistic"), Ramp(2, 2, None)):
        assert chosen(policy, now) not in twins, policy.name


@settings(max_examples=50)
@given(table=tables, phi=st.floats(0.1, 1e4), cost=st.floats(0, 1e4), unit=st.floats(1e-3, 1e3))
def test_the_choice_does_not_depend_on_the_unit_of_time(table, phi, cost, unit):
    now = situation_of(table, SMALL, phi, moves=(0, 0, cost))
    other = situation_of({c: v / unit for c, v in table.items()}, SMALL, phi, moves=(0, 0, cost * unit))
    assert chosen(Goodput(), now) == chosen(Goodput(), other)
    here, there = (Goodput().choose(s).saved_seconds for s in (now, other))
    assert there == pytest.approx(here * unit, rel=1e-6, abs=1e-6 * float(np.abs(here * unit).max()))


def test_a_layout_waits_until_the_rest_of_the_job_pays_for_it():
    """DP2 gains at φ = 1000. What it saves in the 75,000 samples left is the most that a move may cost."""
    never = situation_of(TABLE, of(TP2, 1, 64), 1000.0, moves=(0, 0, 1e6))
    choice = Goodput().choose(never)
    index = list(TABLE).index(of(DP2, 1, 64))
    worth = float(choice.saved_seconds[0, index]) + 1e6
    assert 100 < worth < 750, "TP2 takes some 1500 s, DP2 1100 s"
    assert chosen(Goodput(), situation_of(TABLE, of(TP2, 1, 64), 1000.0, moves=(0, 0, 0.5 * worth))).layout == DP2
    dear = situation_of(TABLE, of(TP2, 1, 64), 1000.0, moves=(0, 0, 1.5 * worth))
    assert chosen(Goodput(), dear).layout == TP2
    said = Goodput().verdict(dear, Goodput().choose(dear), index)
    assert "is below its cost of" in said
    late = situation_of(TABLE, of(TP2, 1, 64), 1000.0, moves=(0, 0, 0.5 * worth), samples=95_000.0)
    assert chosen(Goodput(), late).layout == TP2, "the end is too near"


@settings(max_examples=50)
@given(table=tables, phi=st.floats(0.1, 1e4), cost=st.floats(0, 1e4), error=st.floats(0, 0.3))
def test_savings_are_between_their_ends_and_those_of_staying_are_nothing(table, phi, cost, error):
    now = situation_of(table, SMALL, phi, moves=(0, 0, cost), throughput_error=[error] * len(table))
    ahead = look_ahead(now)
    assert (ahead.saved_low <= ahead.saved_expected).all()
    assert (ahead.saved_expected <= ahead.saved_high + 1e-9 * ahead.seconds_left).all()
    mine = int(now.current[0])
    assert ahead.saved_low[mine] == ahead.saved_expected[mine] == ahead.saved_high[mine] == 0
    assert ahead.saved_expected.max() < ahead.seconds_left
    assert ahead.critical_batch_low < phi < ahead.critical_batch_high


@settings(max_examples=30)
@given(table=tables, phi=st.floats(1.0, 1e4), c_error=st.floats(0.0, 0.7))
def test_nothing_is_at_stake_where_the_critical_batch_is_known_and_more_the_less_it_is(table, phi, c_error):
    now = situation_of(table, SMALL, phi, error=0.01)
    sure = look_ahead(now).regret_bound
    wide = look_ahead(replace(now, forecast=now.forecast.scaled(1.0, np.array([c_error])))).regret_bound
    assert 0 <= sure <= wide + 1e-12 < 1


def test_what_is_at_stake_is_what_following_the_middle_loses_at_the_end_of_the_interval():
    """Two batches at equal throughput per step: the middle prefers the larger, the low end the smaller."""
    table = {of(DP2, 1, 4): 100.0, of(DP2, 1, 64): 300.0}
    error = np.log(10) / QUANTILE_90
    now = replace(situation_of(table, of(DP2, 1, 4), 100.0, error=0.001), samples_left=np.array([500.0]))
    flat = CriticalBatchForecast.unknown(np.array([JOB]))
    for place in np.linspace(100, JOB / 4, 400):
        flat.observe(np.array([place]), np.array([100.0]), np.array([0.001]))
    bound = look_ahead(replace(now, forecast=flat.scaled(1.0, np.array([error])))).regret_bound
    # At φ = 10 the small batch makes 100 / 1.4, the large one 300 / 7.4 of progress a second.
    assert bound == pytest.approx(1 - (300 / 7.4) / (100 / 1.4), abs=0.02)


def test_a_batch_is_nearly_free_and_follows():
    now = situation_of(TABLE, of(DP2, 1, 4), 1000.0, moves=(0, 0, 1e9))
    found = chosen(Goodput(), now)
    assert found.layout == DP2
    assert found.global_batch == 64


def test_an_estimate_that_swings_within_its_interval_does_not_flap():
    """At the crossing of two batches, with 30 % of noise in each estimate, moves are few."""
    from planner.menu import Menu
    from planner.simulator.runs import Runs
    from planner.simulator.simulate import simulate
    from planner.simulator.trajectory import geometric

    menu, speed = Menu.of(list(TABLE)), np.array(list(TABLE.values()))
    crossing = 9.0
    runs = Runs(
        critical_batch=np.stack([geometric(crossing, crossing * 1.0001)] * 8),
        progress=np.full(8, 40_000.0),
        planned_samples=np.full(8, 100_000.0),
        every_samples=np.full(8, 500.0),
        move_seconds=np.full((8, 3), [0.0, 0.0, 10.0]),
        seed=np.arange(8),
        noise=np.full(8, 0.3),
        factor_error=np.ones(8),
    )
    ours = simulate(menu, speed, runs, Goodput())
    greedy = simulate(menu, speed, runs, Copus(0.0))
    assert ours.moves[:, 2].mean() <= 1
    assert ours.moves.sum() < greedy.moves.sum() / 10


def test_a_reason_says_by_how_much_goodput_is_lower_at_first():
    """A larger batch may be worth it for the noise that is to come."""
    current, lower = of(DP2, 1, 64), of(TP2, 1, 64)
    situation = situation_of(TABLE | {lower: 0.97 * TABLE[current]}, current, 1000.0)
    saved = np.zeros((1, len(TABLE)))
    reason = Goodput().reason(situation, Choice(np.array([list(TABLE).index(lower)]), saved))
    assert reason.startswith("goodput of TP2·PP1·DP1 B64 m1 is 3 % below the current, ")


def test_trying_what_never_ran_pays_when_it_may_be_much_faster():
    sure = [0.0] * len(TABLE)
    current = of(DP2, 1, 64)
    index = list(TABLE).index(of(TP2, 1, 64))
    slower = TABLE | {of(TP2, 1, 64): 0.97 * TABLE[current]}
    known = situation_of(slower, current, 1000.0, moves=(0, 0, 1.0), throughput_error=sure)
    assert chosen(Goodput(), known) == current
    guess = [*sure[:index], 0.2, *sure[index + 1 :]]
    unknown = situation_of(slower, current, 1000.0, moves=(0, 0, 1.0), throughput_error=guess)
    choice = Goodput().choose(unknown)
    assert choice.index[0] == index
    assert choice.exploring[0]
    assert Goodput().reason(unknown, choice) == (
        "TP2·PP1·DP1 B64 m1 is worth a trial: gain −3 % (−24.9 % to 25.3 %): relative step time "
        "uncertain by ±29.2 %, it has never run"
    )
    dear = situation_of(slower, current, 1000.0, moves=(0, 0, 1e4), throughput_error=guess)
    assert chosen(Goodput(), dear) == current, "the way there costs more than it may be worth"


def test_what_is_sure_comes_before_any_trial():
    """From a bad place the way leads to what is known to be good; a wild guess is not tried from there."""
    current, good, wild = of(TP2, 1, 2), of(DP2, 1, 64), of(TP2, 1, 64)
    table = {current: 5.0, good: 100.0, wild: 20.0}
    now = situation_of(table, current, 1000.0, moves=(0, 0, 1.0), throughput_error=[0.0, 0.02, 2.0])
    choice = Goodput().choose(now)
    assert now.menu.configurations[int(choice.index[0])] == good
    assert not choice.exploring[0]


@pytest.mark.parametrize("error", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seconds", [110.0, 70.0, 20.0, 5.0])
def test_what_a_trial_is_worth_by_sampling(error, seconds):
    times = 100.0 * np.exp(error * np.random.default_rng(1).standard_normal(400_000))
    worth = worth_trying(*map(np.array, (seconds, 100.0, error)))
    assert worth == pytest.approx(np.maximum(seconds - times, 0.0).mean(), rel=0.03, abs=0.02)


@settings(max_examples=50)
@given(st.floats(-50.0, 500.0), st.floats(0.02, 1.5), st.floats(0.01, 100.0))
def test_a_reservation_value_is_what_makes_a_trial_worth_its_cost(seconds, error, cost):
    seconds, median, error, cost = map(np.array, (seconds, 100.0, error, cost))
    value = reservation_value(seconds, median, error, cost)
    if np.isfinite(value):
        assert worth_trying(seconds - value, median, error) == pytest.approx(cost, rel=1e-3, abs=1e-3)
    else:
        assert worth_trying(seconds, median, error) <= cost


def test_of_two_trials_the_one_that_may_bring_most_goes_first():
    """One is hardly unsure and expected to save a little; the other may be anything. By what a lone trial brings the
    first would win; but whoever tries the second first may still try the first afterwards."""
    seconds, median, cost = np.array([103.0, 103.0]), np.array([100.0, 130.0]), np.array([0.5, 0.5])
    error = np.array([0.02, 0.25])
    alone = worth_trying(seconds, median, error)
    assert alone[0] > alone[1] > cost[1]
    little, much = reservation_value(seconds, median, error, cost)
    assert much > 3 * little > 0


def test_cbs_follows_the_critical_batch_in_the_layout_of_its_end():
    for phi, batch in ((3.0, 4), (11.0, 8), (12.0, 16), (1e6, 64)):
        now = situation_of(TABLE, of(TP2, 1, 2), phi)
        assert chosen(CriticalBatch("pessimistic"), now) == of(TP2, 1, batch)
        assert chosen(CriticalBatch("optimistic"), now) == of(DP2, 1, batch)
        assert chosen(CriticalBatch("present"), now) == of(TP2, 1, batch)


@pytest.mark.parametrize(("samples", "batch"), [(0.0, 2), (12_000.0, 16), (25_000.0, 32), (60_000.0, 64)])
def test_the_ramp_is_a_schedule(samples: float, batch: int):
    """From 2 in steps of 2 up to 64 over the first half of 100,000 samples, between powers of two rounded down."""
    now = situation_of(TABLE, of(DP2, 1, 2), 1.0, samples=max(samples, 1.0))
    assert chosen(Ramp(2, 2, None), now) == of(DP2, 1, batch)


@pytest.mark.parametrize(("decay", "batch"), [(None, 8), (1.0, 8), (0.6, 8), (0.5, 16), (0.2, 32), (0.01, 64)])
def test_seesaw_doubles_the_batch_whenever_the_learning_rate_halves(decay, batch: int):
    now = situation_of(TABLE, of(DP2, 1, 2), 1.0)
    now = replace(now, start_batch=np.array([8.0]), lr_decay=None if decay is None else np.array([decay]))
    assert chosen(Seesaw(), now) == of(DP2, 1, batch)


@pytest.mark.parametrize(("samples", "batch"), [(1.0, 4), (60_000.0, 4), (71_000.0, 64)])
def test_late_switch_grows_once(samples: float, batch: int):
    now = replace(situation_of(TABLE, of(DP2, 1, 4), 1.0, samples=samples), start_batch=np.array([4.0]))
    assert chosen(LateSwitch(0.7), now) == of(DP2, 1, batch)


@pytest.mark.parametrize(("phi", "batch"), [(4.0, 8), (15.9, 8), (16.0, 16), (1000.0, 16)])
def test_cbs_doubling_doubles_once_at_a_time_and_never_shrinks(phi: float, batch: int):
    assert chosen(CriticalBatchDoubling(), situation_of(TABLE, of(DP2, 1, 8), phi)) == of(DP2, 1, batch)


@pytest.mark.parametrize("name", ["ramp", "seesaw", "late-switch"])
def test_a_schedule_waits_for_neither_noise_nor_measurements_and_begins_at_its_start(name: str):
    unknown = {"policy": name, "start_at": "plan", "ramp_start": 2, "ramp_samples": 1000}
    decider = planner({}, start=of(DP2, 2, 8), **unknown)
    first = decider.decide(noise(None, samples=0), of(DP2, 2, 8), 0)
    assert first.chosen.global_batch == {"ramp": 2, "seesaw": 8, "late-switch": 8}[name]
    assert first.chosen.layout == DP2
    later = decider.decide(noise(None, samples=0), first.chosen, 1000)
    assert later.chosen.global_batch == (16 if name == "ramp" else 8)
    assert later.chosen.micro_batch == first.chosen.micro_batch, "the nearest, as nothing is known of their speed"


def test_a_schedule_does_not_run_what_ran_out_of_memory():
    times = {of(DP2, 1, 16): "out of memory", of(DP2, 2, 16): "out of memory"}
    decider = planner(times, start=of(DP2, 1, 8), policy="ramp", ramp_start=2, ramp_samples=100)
    assert decider.decide(noise(None), of(DP2, 1, 8), 900).chosen.global_batch == 8


FASTEST_SMALL = {of(TP2, 1, 2): 0.1, of(TP2, 1, 4): 0.15, of(DP2, 1, 8): 2.0, of(DP2, 1, 4): 1.0, of(TP2, 1, 16): 0.8}


def test_a_job_begins_where_the_policy_says_unless_it_pins_its_start():
    """Nothing is measured yet: laws of critical batches stand in for the noise scale."""
    now = noise(None, samples=0), START, 0
    free = planner(FASTEST_SMALL, policy="goodput", start_at="plan").decide(*now)
    assert free.switch
    assert free.chosen.layout == TP2
    assert free.reason.startswith("nothing is measured yet, published laws suggest a critical batch of ")
    for pinned in (
        planner(FASTEST_SMALL, policy="goodput", start_at="job"),
        planner(FASTEST_SMALL, policy="static", start_at="plan"),
        planner(FASTEST_SMALL, policy="norm-test", start_at="plan"),
    ):
        assert not pinned.decide(*now).switch
    unmeasured = planner({}, policy="goodput", start_at="plan").decide(*now)
    assert not unmeasured.switch, "nothing is known of any configuration"


def test_a_longer_job_is_expected_to_have_a_larger_critical_batch():
    small = ModelShape(layers=2, hidden=512, ffn_hidden=1376, heads=8, kv_heads=4, seq_len=512, vocab=4096)
    large = ModelShape(layers=32, hidden=4096, ffn_hidden=11008, heads=32, kv_heads=32, seq_len=512, vocab=32_000)
    short, long = CriticalBatchForecast.of_laws(1e4, small), CriticalBatchForecast.of_laws(1e8, large)
    ends = [float(law.at(np.array([total]))[0]) for law, total in ((short, 1e4), (long, 1e8))]
    assert 1 < ends[0] < 100 < ends[1] < 10_000
    assert float(short.at(np.array([1.0]))[0]) == pytest.approx(ends[0] / 4.6, rel=0.1)


@pytest.mark.parametrize(
    "name",
    [
        *("static", "smallest-saturating", "ramp", "seesaw", "late-switch"),
        *("norm-test", "cbs", "cbs-doubling", "copus", "goodput"),
    ],
)
def test_every_policy_decides_through_the_planner(name: str):
    times = {of(layout, m, b): 0.1 * b for layout in (DP2, TP2) for m in (1, 2) for b in (4, 8, 16)}
    decider = planner(times, policy=name, ramp_start=4)
    decision = decider.decide(noise(20.0, 15.0, 27.0), START, 1000)
    assert decision.policy == make_policy(PlannerConfig(policy=name)).name == name
    assert decision.reason.startswith("noise scale 20 (15–27) sequences: ")
    assert all(c.verdict for c in decision.candidates)


FASTER = {START: 0.4, of(DP2, 1, 8): 0.5, of(DP2, 1, 16): 0.9, of(TP2, 1, 4): 1.0, of(TP2, 1, 16): 0.3}


def test_the_planner_weighs_what_moves_have_cost():
    decider = planner(FASTER, policy="goodput", layout_move_seconds=10.0)
    moved = decider.decide(noise(50.0, 45.0, 55.0), START, 10_000)
    assert moved.chosen == of(TP2, 1, 16)
    row = next(c for c in moved.candidates if c.configuration == moved.chosen)
    assert (row.move_seconds, row.verdict) == (10.0, "CHOSEN"), "what the job file expects"
    decider = planner(FASTER, policy="goodput")
    for _ in range(3):
        decider.move_costs.observe("layout", 1e6)
    stayed = decider.decide(noise(50.0, 45.0, 55.0), START, 10_000)
    assert stayed.chosen.layout == DP2
    row = next(c for c in stayed.candidates if c.configuration == of(TP2, 1, 16))
    assert row.move_seconds == 1e6
    assert row.verdict.endswith("is below its cost of 278 h")


def test_a_move_is_expected_to_take_as_long_as_the_size_of_the_model_says():
    """The demo moved in 0.3 s, the 32 M model of docs/moving.md in 0.7 s; H100s take seconds to build groups."""
    cores, nodes = Cluster(accelerators_per_node=2), Cluster(nodes=8, accelerators_per_node=8, accelerator="h100-sxm")
    small = ModelShape(layers=2, hidden=512, ffn_hidden=1376, heads=8, kv_heads=4, seq_len=64, vocab=4096)
    large = ModelShape(layers=80, hidden=8192, ffn_hidden=28672, heads=64, kv_heads=8, seq_len=4096, vocab=128_000)
    assert 0.3 < expected_layout_seconds(small, cores, Layout(tp=2), "fp32") < 1.5
    assert 5 < expected_layout_seconds(large, nodes, Layout(tp=8, pp=4, dp=2), "bf16") < 10
    unknown = Cluster(accelerators_per_node=2, accelerator="abacus")
    assert expected_layout_seconds(large, unknown, Layout(dp=2), "bf16") > 1000


def test_the_planner_takes_up_what_it_knew():
    first, resumed = planner(FASTER, policy="goodput"), planner(FASTER, policy="goodput")
    for samples in (256, 512, 768):
        first.decide(noise(5.0 + samples / 256, 4.0, 9.0), START, samples)
    first.move_costs.observe("layout", 123.0)
    resumed.restore(first.state())
    resumed.number = first.number
    now = noise(12.0, 10.0, 15.0), START, 1024
    assert resumed.decide(*now) == first.decide(*now)
    resumed.restore({})


def test_advice_moves_nothing():
    decision = planner(FASTER, policy="goodput", advisory=True).decide(noise(50.0, 45.0, 55.0), START, 10_000)
    assert not decision.switch
    assert decision.advised == of(TP2, 1, 16)
    assert "WOULD BE CHOSEN" in {c.verdict for c in decision.candidates}
    assert decision.reason.endswith("advisory, so nothing changes")


def test_pins_and_limits():
    from test_planner_decision import CLUSTER, MODEL

    from planner.space import candidates

    free = CONFIG.model_copy(update={"layouts": None})
    pinned = candidates(free.model_copy(update={"tp": 1, "max_pp": 1}), MODEL, CLUSTER, START)
    assert {c.layout for c in pinned} == {DP2}
    assert len({c.layout for c in candidates(free, MODEL, CLUSTER, START)}) == 4
    assert {c.layout.pp for c in candidates(free.model_copy(update={"max_pp": 1}), MODEL, CLUSTER, START)} == {1}
    decider = planner(FASTER, policy="goodput", max_layout_moves_per_hour=1)
    assert decider.decide(noise(50.0, 45.0, 55.0), START, 10_000).switch
    decider.move_costs.observe("layout", 1.0)
    held = decider.decide(noise(50.0, 45.0, 55.0), START, 10_000)
    assert held.chosen.layout == DP2
    refused = next(c for c in held.candidates if c.configuration == of(TP2, 1, 16))
    assert refused.verdict == "limit: 1 layout move an hour"


WAITS, RIVAL = of(DP2, 1, 64), of(TP2, 1, 64)


@pytest.mark.parametrize(
    ("faster", "cost", "error", "phi_error", "unseen", "says"),
    [
        (1.0, 1.0, 0.0, 0.05, True, "no gain"),
        (0.5, 1.0, 0.0, 0.05, True, "no gain"),
        (1.3, 1e4, 0.0, 0.05, True, "gain 30 % is below its cost of 2.8 h"),
        (1.3, 1e4, 0.2, 0.05, False, "gain 30 % is below its cost of 2.8 h"),
        (
            *(1.01, 1.0, 0.2, 0.05, False),
            "gain 1 % (−21.8 % to 30.5 %): relative step time uncertain by ±29.2 %",
        ),
    ],
)
def test_every_verdict_of_our_rule(faster, cost, error, phi_error, unseen, says):
    """One line each: what is gained, and what is not known of it and how much."""
    speeds = {WAITS: 50.0, RIVAL: 50.0 * faster}
    now = situation_of(speeds, WAITS, 1000.0, moves=(0, 0, cost), throughput_error=[0.0, error], error=phi_error)
    now = replace(now, unseen=np.array([[False, unseen]]))
    choice = Goodput().choose(now)
    assert choice.index[0] == 0
    assert Goodput().verdict(now, choice, 1) == says


def test_a_gain_that_hangs_on_the_noise_scale_says_so():
    speeds = {of(DP2, 1, 4): 10.0, of(DP2, 1, 64): 14.0}
    now = situation_of(speeds, of(DP2, 1, 4), 400.0, error=2.0, throughput_error=[0.0, 0.01])
    unsure = Choice(now.current, saved_seconds=np.array([[0.0, -1.0]]))
    found = Goodput().verdict(now, unsure, 1)
    assert found.startswith("gain 21.8 % (")  # 1.4 × (1 + 4/400) / (1 + 64/400): at the φ that is shown
    assert ": critical batch uncertain by ±" in found


def test_what_saves_less_than_the_chosen_one_says_so():
    speeds = {WAITS: 50.0, RIVAL: 60.0, of(TP2, 2, 64): 70.0}
    now = situation_of(speeds, WAITS, 1000.0, moves=(0, 0, 1.0))
    choice = Goodput().choose(now)
    assert choice.index[0] == 2
    assert Goodput().verdict(now, choice, 1) == "gain 20 %, saves less than the chosen one"
