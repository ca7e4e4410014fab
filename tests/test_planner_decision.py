"""Decisions: what is chosen, and what is said about it."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from copus.events import DecisionMade
from planner.config import PlannerConfig
from planner.decision_times import decision_interval, decision_is_due
from planner.planner import Planner
from planner.predictor import Predictor
from planner.space import candidates
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.decision import Decision
from profiles.formatting import duration, noise_in_words, percent, signed_percent, three_digits
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.model_shape import ModelShape
from profiles.noise_scale import NoiseScale
from profiles.throughput import CostPredictions, Prediction, Throughput

MODEL = ModelShape(layers=4, hidden=64, ffn_hidden=192, heads=4, kv_heads=2, seq_len=32, vocab=512)
HERE = Fingerprint(model=MODEL.digest, precision="fp32", backend="b", hardware="h", software="s")
CLUSTER = Cluster(accelerators_per_node=2)
DP2, TP2 = Layout(dp=2), Layout(tp=2)
START = Configuration(layout=DP2, micro_batch=1, global_batch=4)
CONFIG = PlannerConfig(
    policy="copus", start="job", min_global_batch=1, max_global_batch=16, max_micro_batch=2, layouts=[DP2, TP2]
)


def config(**changes):
    return CONFIG.model_copy(update=changes)


def noise(value, low=None, high=None, samples=100):
    return NoiseScale(grad_sq=1.0, noise_trace=1.0, value=value, low=low, high=high, samples=samples)


def row(configuration, step_seconds=None, failure=None):
    return Measurement(
        fingerprint=HERE,
        model=MODEL,
        configuration=configuration,
        step_seconds=step_seconds,
        spread_seconds=None if failure else 0.0,
        count=0 if failure else 3,
        failure=failure,
        peak_bytes=1000,
        time=0.0,
    )


def deciding(throughput, start=START, number=0, start_at="job", **changes):
    """A planner that knows these step times; `start_at` is `planner.start`."""
    changes["start"] = start_at
    return Planner(Predictor(config(**changes), MODEL, CLUSTER, "fp32", start, throughput), number)


def planner(times, start=START, **changes):
    """A planner over a table {configuration: step_seconds or failure}."""
    rows = [row(c, failure=t) if isinstance(t, str) else row(c, step_seconds=t) for c, t in times.items()]
    return deciding(Throughput(rows), start, **changes)


def verdicts(decision):
    return {score.configuration.label: score.verdict for score in decision.candidates}


def of(layout, micro_batch, global_batch):
    return Configuration(layout=layout, micro_batch=micro_batch, global_batch=global_batch)


# By hand, with φ = 2 · 8 = 16 sequences: SE is 16/17 at B1, 8/9 at B2, 4/5 at B4, 2/3 at B8, 1/2 at B16.
TABLE = {
    of(DP2, 1, 2): 0.25,  # 8 a second: goodput 7.111, gain −1/9
    of(DP2, 1, 4): 0.4,  # 10 a second: goodput 8, the current one
    of(DP2, 1, 8): 0.64,  # 12.5 a second: goodput 8.333, gain 1/24
    of(DP2, 1, 16): 1.28,  # 12.5 a second: goodput 6.25, gain −0.21875
    of(DP2, 2, 4): 0.4,  # 10 a second: goodput 8, gain 0
    of(DP2, 2, 8): 0.4,  # 20 a second: goodput 13.333, gain 2/3
    of(DP2, 2, 16): "out of memory",
    # Nothing of TP2 m1 is measured.
    of(TP2, 2, 2): 0.14,  # 14.286 a second: goodput 12.698, gain 0.5873
    of(TP2, 2, 4): 0.2,  # 20 a second: goodput 16, gain 1
    of(TP2, 2, 8): 0.32,  # 25 a second: goodput 16.667, gain 13/12
    # (TP2, 2, 16) follows from 0.08 + 0.06 · 8 = 0.56 s: 28.571 a second, goodput 14.286, gain 0.7857
}


def test_the_golden_decision():
    decision = planner(TABLE).decide(noise(8.0, 6.5, 11.0), START, 1000)
    assert decision.chosen == of(TP2, 2, 8)
    assert decision.switch
    assert decision.critical_batch == 16.0
    assert decision.predicted_gain == pytest.approx(13 / 12)
    assert decision.reason == (
        "noise scale 8 (6.5–11) sequences: goodput of TP2·PP1·DP1 B8 m2 is 2.08× the current; "
        "4 micro-batches on one replica, since max_micro_batch(2) is less than the batch"
    )
    assert list(verdicts(decision).items()) == [
        ("TP2·PP1·DP1 B8 m2", "CHOSEN"),
        ("TP2·PP1·DP1 B4 m2", "gain 100 %, less than the chosen one's"),
        ("TP2·PP1·DP1 B16 m2", "gain 78.5 %, less than the chosen one's"),
        ("TP1·PP1·DP2 B8 m2", "gain 66.6 %, less than the chosen one's"),
        ("TP2·PP1·DP1 B2 m2", "gain 58.7 %, less than the chosen one's"),
        ("TP1·PP1·DP2 B8 m1", "gain 4.1 % is below 10 %"),
        ("TP1·PP1·DP2 B4 m1", "current"),
        ("TP1·PP1·DP2 B4 m2", "no gain"),
        ("TP1·PP1·DP2 B2 m1", "slower: −11.1 %"),
        ("TP1·PP1·DP2 B16 m1", "lower goodput: −21.8 %"),
        ("TP2·PP1·DP1 B1 m1", "not measured"),
        ("TP2·PP1·DP1 B2 m1", "not measured"),
        ("TP2·PP1·DP1 B4 m1", "not measured"),
        ("TP2·PP1·DP1 B8 m1", "not measured"),
        ("TP1·PP1·DP2 B16 m2", "out of memory"),
        ("TP2·PP1·DP1 B16 m1", "not measured"),
    ]
    goodputs = {score.configuration.label: score.goodput for score in decision.candidates}
    assert goodputs["TP2·PP1·DP1 B8 m2"] == pytest.approx(25 * 2 / 3)
    assert goodputs["TP2·PP1·DP1 B16 m2"] == pytest.approx(16 / 0.56 / 2)
    assert goodputs["TP1·PP1·DP2 B16 m2"] is None
    sources = {score.configuration.label: (score.source, score.peak_bytes) for score in decision.candidates}
    assert sources["TP2·PP1·DP1 B16 m2"] == ("interpolated", 1000)
    source, peak_bytes = sources["TP2·PP1·DP1 B2 m1"]
    assert source == "none"
    assert peak_bytes > 1000, "as the memory model expects"


def test_a_batch_of_one_sequence_is_chosen_if_its_goodput_is_the_best():
    """Its noise is measured with a second micro-batch in the steps that are sampled."""
    decision = planner({**TABLE, of(TP2, 1, 1): 0.05}).decide(noise(8.0), START, 0)
    assert decision.chosen == of(TP2, 1, 1), "20 a second, times 16/17"


def test_a_lower_goodput_whose_saving_may_still_be_a_gain_is_unsure_and_not_worse():
    """The saving is for the rest of the job, and its interval has the error of φ and of the step times in it."""
    decision = planner(TABLE, policy="goodput").decide(noise(8.0, 6.5, 11.0), START, 1000)
    lower = [score for score in decision.candidates if score.gain is not None and score.gain < 0]
    said = {score.verdict: score.saved_high_seconds > 0 for score in lower}
    assert said == {"slower: −10.5 %": False, "saving uncertain: goodput −23.4 %": True}


def test_more_noise_moves_the_golden_decision_to_a_larger_batch():
    chosen = [planner(TABLE).decide(noise(value), START, 0).chosen.global_batch for value in (0.5, 8, 200)]
    assert chosen == [2, 8, 16]


def test_the_lr_aware_score_by_hand():
    decision = planner(TABLE, objective="lr-aware").decide(noise(8.0), START, 0)
    assert decision.objective == "lr-aware"
    assert decision.chosen == of(TP2, 2, 16)  # 14.286 · √16 = 57.1 over 16.667 · √8 = 47.1
    assert decision.predicted_gain == pytest.approx(14.2857 * 4 / (8 * 2) - 1, rel=1e-4)


def test_a_gain_below_the_limit_is_named_and_not_taken():
    decision = planner(TABLE, min_gain=1.1).decide(noise(8.0, 6.5), START, 1000)
    assert decision.chosen == START
    assert decision.predicted_gain == 0.0
    assert decision.reason == (
        "noise scale 8 (6.5–∞) sequences: TP2·PP1·DP1 B8 m2 is the best, "
        "but its gain of 108.3 % over the current is below 110 %"
    )
    assert verdicts(decision)["TP2·PP1·DP1 B8 m2"] == "gain 108.3 % is below 110 %"


def test_the_static_policy_stays_and_says_what_it_forgoes():
    decision = planner(TABLE, policy="static").decide(noise(8.0), START, 0)
    assert (decision.policy, decision.chosen, decision.switch) == ("static", START, False)
    assert decision.reason == (
        "noise scale 8 sequences: TP2·PP1·DP1 B8 m2 would gain 108.3 %; the static policy never moves"
    )
    assert verdicts(decision)["TP2·PP1·DP1 B8 m2"] == "gain 108.3 %, but the policy is static"


@pytest.mark.parametrize(
    ("steps", "gains"),
    [(0, ""), (19, "; gains are unknown: the noise scale has seen 19 steps, 20 are needed")],
)
def test_the_static_policy_waits_for_no_noise(steps, gains):
    decision = planner(TABLE, policy="static").decide(noise(8.0 if steps else None, samples=steps), START, 0)
    assert decision.reason == f"the static policy never moves{gains}"


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        (noise(None, samples=100), "the noise scale cannot be told yet after 100 steps; nothing changes"),
        (noise(-3.0, samples=100), "the noise scale cannot be told yet after 100 steps; nothing changes"),
        (noise(8.0, samples=19), "the noise scale has seen 19 steps, 20 are needed; nothing changes"),
    ],
)
def test_without_noise_nothing_moves_but_throughput_is_listed(measured, says):
    decision = planner(TABLE).decide(measured, START, 0)
    assert (decision.chosen, decision.reason) == (START, says)
    assert (decision.critical_batch, decision.predicted_gain) == (None, None)
    best = decision.candidates[0]
    assert (best.configuration, best.goodput, best.efficiency) == (of(TP2, 2, 16), None, None)
    assert best.samples_per_second == pytest.approx(16 / 0.56)
    assert set(verdicts(decision).values()) == {"no decision yet", "current", "not measured", "out of memory"}


def test_a_start_that_cannot_measure_noise_is_told_so():
    start = of(TP2, 1, 1)
    decision = planner(TABLE, start, noise_source="replica").decide(noise(None, samples=0), start, 0)
    assert decision.reason == (
        "the noise scale is unknown, and cannot be measured with TP2·PP1·DP1 B1 m1: one part per step; nothing changes"
    )
    assert verdicts(decision)["TP2·PP1·DP1 B1 m1"] == "current"


def test_replica_noise_needs_two_replicas():
    decision = planner(TABLE, noise_source="replica").decide(noise(8.0), START, 0)
    assert decision.chosen == of(DP2, 2, 8)
    assert verdicts(decision)["TP2·PP1·DP1 B8 m2"] == "noise cannot be measured: one part per step"


def test_an_unknown_current_configuration_stays_until_its_own_steps_are_seen():
    current = of(TP2, 1, 4)
    late = planner(TABLE)
    decision = late.decide(noise(8.0), current, 0)
    assert decision.chosen == current
    assert decision.reason == (
        "noise scale 8 sequences: the throughput of the current configuration, TP2·PP1·DP1 B4 m1, is not known; "
        "nothing changes"
    )
    assert verdicts(decision)["TP2·PP1·DP1 B8 m2"] == "no decision yet"
    late.throughput.observe(current, 0.4)  # as fast as the usual start
    decision = late.decide(noise(8.0), current, 0)
    assert decision.chosen == of(TP2, 2, 8)
    assert decision.predicted_gain == pytest.approx(13 / 12)


def test_a_current_configuration_outside_the_space_is_listed():
    current = of(DP2, 1, 6)
    decision = planner({**TABLE, current: 0.1}).decide(noise(8.0), current, 0)
    assert decision.chosen == current
    assert verdicts(decision)["TP1·PP1·DP2 B6 m1"] == "current"


def test_a_line_that_is_hardly_known_is_refused_and_a_prediction_is_left_to_the_policy():
    for source, refused in (("extrapolated", True), ("predicted", False)):
        guess = {of(TP2, 1, 16): Prediction(step_seconds=0.5, error=0.5, source=source)}
        decider = deciding(Throughput([row(START, step_seconds=1.0)], CostPredictions(guess)), policy="goodput")
        verdict = verdicts(decider.decide(noise(50.0, 45.0, 55.0), START, 0))[of(TP2, 1, 16).label]
        assert verdict.startswith("throughput too uncertain: step time 0.5 s ± 90.2 %") == refused


def test_decisions_are_numbered_and_the_number_can_be_restored():
    first = planner(TABLE)
    assert [first.decide(noise(8.0), START, 0).number for _ in range(3)] == [0, 1, 2]
    resumed = deciding(Throughput(), number=7)
    assert resumed.decide(noise(8.0), START, 0).number == 7


def test_a_decision_survives_json():
    decision = planner(TABLE).decide(noise(8.0, 6.5, 11.0), START, 1000)
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


# Properties.

SPACE = candidates(CONFIG, MODEL, CLUSTER, START)
tables = st.lists(st.integers(1, 4000), min_size=len(SPACE), max_size=len(SPACE)).map(
    lambda times: {c: milliseconds / 1000 for c, milliseconds in zip(SPACE, times, strict=True)}
)
currents = st.sampled_from(SPACE)
noises = st.floats(0.05, 1e4)


def speed(table, configuration):
    return configuration.global_batch / table[configuration]


@settings(max_examples=60)
@given(tables, currents, noises, noises)
def test_more_noise_never_chooses_a_smaller_batch(table, current, value, other):
    assume(value < other)
    fixed = planner(table, current, min_gain=0.0)
    batches = [fixed.decide(noise(v), current, 0).chosen.global_batch for v in (value, other)]
    assert batches[0] <= batches[1]


@settings(max_examples=60)
@given(tables, currents, noises)
def test_a_dominated_configuration_is_never_chosen(table, current, value):
    # A lone micro-batch stays in one piece: halves would change the times that are compared.
    whole = planner(table, current, min_gain=0.0, noise_halve_every_steps=10**9)
    chosen = whole.decide(noise(value), current, 0).chosen
    for other in SPACE:
        may = other == current or other.global_batch > 1
        if may and other.global_batch <= chosen.global_batch:
            assert speed(table, other) <= speed(table, chosen)


@settings(max_examples=60)
@given(tables, currents, noises, st.floats(0, 2))
def test_a_move_is_to_the_best_and_gains_at_least_the_limit(table, current, value, min_gain):
    decision = planner(table, current, min_gain=min_gain).decide(noise(value), current, 0)
    gains = [s.gain for s in decision.candidates if s.verdict != "noise cannot be measured: one part per step"]
    best = max(gains)
    assert decision.switch == (best > 0 and best >= min_gain)
    assert decision.predicted_gain == (best if decision.switch else 0.0)
    assert gains == sorted(gains, reverse=True)
    assert decision.candidates[0].gain == best


@settings(max_examples=30)
@given(currents, noises, st.integers(1, 4000))
def test_no_gain_is_no_move(current, value, milliseconds):
    """Equal batches take equally long, other batches gain nothing: nothing to move for, even with min_gain = 0."""
    table = {c: milliseconds / 1000 if c.global_batch == current.global_batch else 1e6 for c in SPACE}
    decision = planner(table, current, min_gain=0.0).decide(noise(value), current, 0)
    assert not decision.switch
    assert decision.reason.endswith("no configuration is better than the current one")


@settings(max_examples=30)
@given(tables, currents, noises, st.integers(-20, 20))
def test_the_unit_of_time_does_not_matter(table, current, value, exponent):
    unit = 2.0**exponent  # a power of two scales floats without rounding
    decision = planner(table, current).decide(noise(value), current, 0)
    other = planner({c: t * unit for c, t in table.items()}, current).decide(noise(value), current, 0)
    assert (other.chosen, other.predicted_gain, other.reason) == (
        decision.chosen,
        decision.predicted_gain,
        decision.reason,
    )
    assert verdicts(other) == verdicts(decision)


@settings(max_examples=20)
@given(tables, currents, noises)
def test_the_same_knowledge_gives_the_same_decision(table, current, value):
    backwards = dict(reversed(table.items()))  # the order of the table's lines is not knowledge
    decisions = [planner(t, current).decide(noise(value), current, 5) for t in (table, table, backwards)]
    assert decisions[0] == decisions[1] == decisions[2]


# Words.


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (0.1, "10 %"),
        (0.0999, "9.9 %"),
        (0.29, "29 %"),
        (-0.345, "−34.5 %"),
        (0.0, "0 %"),
        (-0.0001, "0 %"),
        (1.5, "150 %"),
    ],
)
def test_percent(share, says):
    assert percent(share) == says


def test_the_noise_in_words():
    assert noise_in_words(noise(37.2, 31.4, 46.0)) == "noise scale 37.2 (31.4–46) sequences"
    assert noise_in_words(noise(37.2, 31.4, None)) == "noise scale 37.2 (31.4–∞) sequences"
    assert noise_in_words(noise(1234567.0)) == "noise scale 1230000 sequences"
    amounts = (0.03214, 999.7, 8192, 3e-5, 0.0, -2.0, 2.50)
    assert [three_digits(amount) for amount in amounts] == ["0.0321", "1000", "8190", "0.00003", "0", "-2", "2.5"]


def test_the_unit_of_a_duration_follows_from_the_rounded_figure() -> None:
    seconds = (0.38, 38, 99.4, 99.7, 720, 5960, 5980, 12_600, 400_000)
    words = ["0.38 s", "38 s", "99 s", "1.7 min", "12 min", "99 min", "1.7 h", "3.5 h", "111 h"]
    assert [duration(each) for each in seconds] == words
    assert duration(float("inf")) == "∞"
    assert [duration(seconds) for seconds in (1.24e-5, 0.00142, 0.099, 0.0996)] == [
        "0.012 ms",
        "1.4 ms",
        "99 ms",
        "0.1 s",
    ]
    assert [signed_percent(share) for share in (0.034, -0.117, 0.0001, -0.0001)] == ["+3.4 %", "−12 %", "0 %", "0 %"]


def test_the_decisions_of_a_long_run_take_little_room():
    """250,000 steps of the event log stay below 200 MB: a step has some 330 bytes, and every fourth measures the noise,
    which takes some 500. The planner's own decisions are counted, and one of a large space is weighed."""
    batch, steps, every_samples = 32, 250_000, 256
    decisions, samples = 0, 0
    for _ in range(steps):
        decisions += decision_is_due(samples, samples + batch, batch, every_samples)
        samples += batch
    wide = {"policy": "goodput", "max_micro_batch": 64, "max_global_batch": 2048}
    space = deciding(Throughput(), **wide).candidates
    decider = planner({c: 0.01 * c.global_batch for c in space}, **wide)
    decision = decider.decide(noise(50.0, 45.0, 55.0), START, 10_000)
    assert len(decision.candidates) + decision.omitted == len(set(decider.candidates) | {START})
    size = len(DecisionMade(step=1, samples_consumed=1, decision=decision, seconds=1.0).model_dump_json())
    assert decisions * size < 20e6
    assert decisions * size + steps * 330 + steps / 4 * 500 < 200e6


@given(st.integers(1, 10**9), st.integers(1, 4096), st.integers(1, 10**5))
def test_decisions_are_never_nearer_than_ten_steps(samples, batch, every_samples):
    interval = decision_interval(samples, batch, every_samples)
    assert interval >= max(10 * batch, every_samples, samples / 200)
    assert interval < 2 * max(10 * batch, every_samples, samples / 200)


def test_a_measured_time_that_is_hardly_known_bars_only_policies_that_do_not_weigh_errors():
    noisy = of(TP2, 1, 16)
    for policy, refused in (("copus", True), ("goodput", False)):
        rows = [row(START, step_seconds=1.0), row(noisy, step_seconds=0.5).model_copy(update={"spread_seconds": 2.0})]
        decider = deciding(Throughput(rows), policy=policy)
        verdict = verdicts(decider.decide(noise(50.0, 45.0, 55.0), START, 0))[noisy.label]
        assert verdict.startswith("throughput too uncertain: step time ") == refused


def test_a_limit_of_time_is_an_end_of_the_job_too():
    """A move that pays by the end of the tokens does not if `training.max_minutes` stops the job before."""
    settings = {"policy": "goodput", "layout_move_seconds": 20.0, "trial_budget": 0.0}
    whole = planner(TABLE, **settings).decide(noise(8.0, 7.5, 8.5), START, 10_000)
    assert whole.chosen.layout == TP2
    assert whole.seconds_left is not None
    assert whole.seconds_left > 1000
    short = planner(TABLE, **settings).decide(noise(8.0, 7.5, 8.5), START, 10_000, seconds_left=30.0)
    assert short.seconds_left is not None
    assert short.seconds_left < 31
    assert short.chosen.layout == DP2
    assert short.chosen != START, "another batch costs nothing"
    assert planner(TABLE, **settings).decide(noise(8.0), START, 10_000, seconds_left=0.0).chosen.layout == DP2


def test_the_start_goes_to_another_layout_only_if_that_pays_for_the_move():
    hardly = {of(DP2, 2, 4): 0.400, of(TP2, 2, 4): 0.399}
    start, settings = of(DP2, 2, 4), {"start_at": "plan", "policy": "goodput", "trial_budget": 0.0}
    dear = planner(hardly, start, **settings, layout_move_seconds=10.0).decide(noise(None), start, 0, seconds_left=60)
    assert dear.chosen == start
    free = planner(hardly, start, **settings, layout_move_seconds=0.0).decide(noise(None), start, 0, seconds_left=60)
    assert free.chosen == of(TP2, 2, 4)
