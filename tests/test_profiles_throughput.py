"""Predictions from measured rows, the affine fit, and live steps."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import Machine

from profiles.affine import Point, fit_affine
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.model_shape import ModelShape
from profiles.throughput import CostPredictions, Prediction, Throughput

MODEL = ModelShape(layers=2, hidden=64, ffn_hidden=128, heads=4, kv_heads=2, seq_len=32, vocab=512)
HERE = Fingerprint(model=MODEL.digest, precision="fp32", backend="b", hardware="h", software="s")
DP2 = Layout(dp=2)
TP2 = Layout(tp=2)

seconds = st.floats(1e-3, 1e3)
counts = st.lists(st.integers(1, 512), min_size=2, max_size=8, unique=True)


def configuration(n, layout=DP2, micro_batch=1):
    return Configuration(layout=layout, micro_batch=micro_batch, global_batch=n * layout.dp * micro_batch)


def row(n, step_seconds=None, layout=DP2, micro_batch=1, spread=0.0, count=3, time=0.0, failure=None, peak=None):
    return Measurement(
        fingerprint=HERE,
        model=MODEL,
        configuration=configuration(n, layout, micro_batch),
        step_seconds=step_seconds,
        spread_seconds=spread if step_seconds else None,
        count=count if step_seconds else 0,
        peak_bytes=peak,
        failure=failure,
        time=time,
    )


# The affine fit.


@given(seconds, seconds, counts)
def test_noise_free_rows_give_back_the_line(fixed, microbatch, at):
    fit = fit_affine([Point(n, fixed + microbatch * n, 0.0) for n in at])
    largest = fixed + microbatch * max(at)
    # The error of each coefficient is that of the times (1e-16 relative) over the lever arm that the counts give.
    assert fit.fixed_seconds == pytest.approx(fixed, abs=1e-9 * largest)
    assert fit.microbatch_seconds == pytest.approx(microbatch, rel=1e-9, abs=1e-9 * largest)
    assert fit.error_seconds(max(at)) <= 1e-7 * largest


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(0, 2**32))
def test_noisy_rows_give_the_line_within_tolerance(fixed, microbatch, seed):
    noise = random.Random(seed)
    at = [1, 2, 4, 8, 16, 32]
    fit = fit_affine([Point(n, (fixed + microbatch * n) * noise.uniform(0.97, 1.03), 0.0) for n in at])
    for n in [*at, 64]:
        assert fit.step_seconds(n) == pytest.approx(fixed + microbatch * n, rel=0.1)


@given(st.dictionaries(st.integers(1, 512), seconds, min_size=2, max_size=8))
def test_the_fit_keeps_its_bounds_whatever_the_times(times):
    fit = fit_affine([Point(n, t, 0.1 * t) for n, t in times.items()])
    assert fit.fixed_seconds >= 0
    assert fit.microbatch_seconds > 0
    assert fit.error_seconds(max(times)) >= 0


@given(st.dictionaries(st.integers(1, 64), seconds, min_size=2, max_size=5), st.integers(-20, 20))
def test_the_fit_does_not_depend_on_the_unit_of_time(times, exponent):
    unit = 2.0**exponent  # a power of two scales floats without rounding
    fit = fit_affine([Point(n, t, t / 8) for n, t in times.items()])
    other = fit_affine([Point(n, t * unit, t / 8 * unit) for n, t in times.items()])
    assert other.step_seconds(100) == unit * fit.step_seconds(100)
    assert other.error_seconds(100) == pytest.approx(unit * fit.error_seconds(100))


def test_the_fit_by_hand():
    # Through (1, 3 ± 0.3) and (4, 6 ± 0.4): 2 + 1·n. At 7 it is 2·t(4) − t(1) = 9 ± √((2·0.4)² + 0.3²).
    fit = fit_affine([Point(1, 3.0, 0.3), Point(4, 6.0, 0.4)])
    assert (fit.fixed_seconds, fit.microbatch_seconds) == (pytest.approx(2), pytest.approx(1))
    assert fit.step_seconds(7) == pytest.approx(9)
    assert fit.error_seconds(7) == pytest.approx((0.8**2 + 0.3**2) ** 0.5)
    assert fit.error_seconds(4) == pytest.approx(0.4)


def test_times_that_fall_give_the_line_through_the_origin():
    # Weights 1/t²: b = Σ(n/t) / Σ(n/t)² = (1/4 + 2/2) / (1/16 + 1) = 20/17.
    fit = fit_affine([Point(1, 4.0, 0.0), Point(2, 2.0, 0.0)])
    assert fit.fixed_seconds == 0
    assert fit.microbatch_seconds == pytest.approx(20 / 17)
    assert fit.error_seconds(2) > 0.4 * fit.step_seconds(2)  # a line this wrong says so


def test_one_count_is_no_line():
    with pytest.raises(ValueError, match=r"two distinct numbers of micro-batches, got \[3\]"):
        fit_affine([Point(3, 1.0, 0.0), Point(3, 1.1, 0.0)])


# Rows.


def test_rows_of_one_configuration_are_combined_by_the_median_of_their_steps():
    rows = [
        row(2, 1.0, spread=0.1, count=3, peak=10),
        row(2, 2.0, spread=0.3, count=1, peak=30),
        row(2, 9.0, spread=0.9, count=1),
    ]
    prediction = Throughput(rows).predict(configuration(2))
    assert prediction.source == "measured"
    assert prediction.step_seconds == 1.0
    assert prediction.peak_bytes == 30


def error_of(*rows):
    return Throughput(rows).predict(rows[0].configuration).error


def test_the_error_of_a_measured_time_is_that_of_a_median():
    quiet, noisy = (error_of(row(2, 1.0, spread=spread, count=100)) for spread in (0.0, 0.3))
    assert quiet < noisy
    assert noisy == pytest.approx(math.hypot(0.3 / 1.2816 * math.sqrt(math.pi / 2 / 100), 0.02), rel=0.05)
    assert error_of(row(2, 1.0, spread=0.3, count=1000)) < noisy
    assert error_of(row(2, 1.0, count=3)) > 0.01, "three steps that agree by chance are not known exactly"


def test_measurements_that_disagree_widen_the_intervals_of_all():
    """Nobody knows which one a slow episode has met."""
    agree, disagree = ([row(2, 1.0), row(2, again)] for again in (1.02, 1.8))
    once = row(8, 4.0)
    errors = [Throughput([*rows, once]).predict(once.configuration).error for rows in (agree, disagree)]
    assert errors[0] < 0.03 < 0.1 < errors[1]
    assert Throughput(disagree).predict(configuration(2)).step_seconds == pytest.approx(1.4)


def test_a_table_is_trusted_as_little_as_the_machine_has_been_seen_to_drift():
    rng = np.random.default_rng(0)
    errors = []
    for kind in ("still", "bursty"):
        machine, throughput = Machine(kind, rng), Throughput([row(2, 1.0), row(2, 1.0, TP2)])
        for _ in range(400):
            throughput.observe(configuration(2), machine.step(1.0))
        errors.append(throughput.error_beside(configuration(2, TP2), configuration(2)))
    assert errors[0] < 0.05 < 0.1 < errors[1] < 0.4


def test_a_comparison_is_what_counts_of_a_trial():
    throughput = observed(Throughput([row(2, 1.0), row(2, 1.0, TP2)]), configuration(2), 1.0, 20)
    throughput.observe_comparison(configuration(2, TP2), configuration(2), math.log(1.1), 0.01)
    tried = throughput.predict(configuration(2, TP2))
    assert (tried.source, tried.memory_seen) == ("seen", True)
    assert tried.step_seconds == pytest.approx(1.1, rel=0.01)
    assert throughput.error_beside(configuration(2, TP2), configuration(2)) < 0.015
    unknown = configuration(2, micro_batch=8)
    throughput.observe_comparison(unknown, configuration(2), math.log(0.5), 0.02)
    assert throughput.predict(unknown).step_seconds == pytest.approx(0.5, rel=0.02)
    assert throughput.error_beside(unknown, configuration(2)) < 0.03
    with pytest.raises(ValueError, match="log_ratio"):
        throughput.observe_comparison(unknown, configuration(2), math.inf, 0.02)


def test_between_and_beyond_the_measured_counts():
    throughput = Throughput([row(2, 3.0, peak=7), row(4, 5.0, peak=9)])
    between = throughput.predict(configuration(3))
    assert (between.source, between.step_seconds, between.peak_bytes) == ("interpolated", pytest.approx(4.0), 9)
    assert throughput.predict(configuration(16)).source == "interpolated"
    far = throughput.predict(configuration(17))
    assert (far.source, far.step_seconds) == ("extrapolated", pytest.approx(18.0))
    assert throughput.predict(configuration(1)) is None


def test_nothing_is_said_about_other_layouts_and_micro_batches():
    throughput = Throughput([row(2, 3.0), row(4, 5.0)])
    assert throughput.predict(configuration(2, layout=TP2)) is None
    assert throughput.predict(configuration(2, micro_batch=2)) is None
    assert Throughput([row(2, 3.0)]).predict(configuration(4)) is None
    assert Throughput().predict(configuration(1)) is None


def test_the_newest_row_decides_whether_a_configuration_runs():
    failed = Throughput([row(2, 1.0, time=1), row(2, failure="out of memory", time=2)]).predict(configuration(2))
    assert (failed.failure, failed.step_seconds) == ("out of memory", None)
    mended = Throughput([row(2, failure="out of memory", time=1), row(2, 1.0, time=2)]).predict(configuration(2))
    assert (mended.failure, mended.step_seconds) == (None, 1.0)


def test_a_failure_holds_for_larger_counts_but_not_between_counts_that_ran():
    throughput = Throughput([row(1, 1.0), row(2, 2.0), row(8, failure="out of memory")])
    assert throughput.predict(configuration(4)).step_seconds == pytest.approx(4.0)
    assert throughput.predict(configuration(8)).failure == "out of memory"
    assert throughput.predict(configuration(9)).failure == "out of memory"
    flaky = Throughput([row(1, 1.0), row(2, failure="timeout"), row(4, 4.0)])
    assert flaky.predict(configuration(2)).failure == "timeout"
    assert flaky.predict(configuration(3)).step_seconds == pytest.approx(3.0)
    assert flaky.predict(configuration(8)).failure is None
    assert Throughput([row(2, failure="out of memory")]).predict(configuration(1)) is None


# Live steps.


def test_a_failure_holds_for_larger_micro_batches_of_as_many_sequences():
    known = Throughput([row(4, failure="out of memory", micro_batch=2), row(2, 1.0, micro_batch=8)])

    def failure(n, micro_batch, layout=DP2):
        prediction = known.predict(configuration(n, layout, micro_batch))
        return prediction and prediction.failure

    assert failure(2, 4) == failure(4, 4) == "out of memory"
    assert failure(1, 4) is None, "four sequences may fit where eight did not"
    assert failure(8, 1) is None, "a smaller micro-batch takes less"
    assert failure(2, 4, TP2) is None
    assert failure(2, 8) is None, "it ran"


def observed(throughput, configuration, step_seconds, steps=30):
    for _ in range(steps):
        throughput.observe(configuration, step_seconds)
    return throughput


def test_live_steps_take_over_after_five():
    throughput = observed(Throughput([row(2, 1.0, peak=9)]), configuration(2), 1.5, 4)
    assert throughput.predict(configuration(2)).source == "measured"
    throughput.observe(configuration(2), 1.5)
    seen = throughput.predict(configuration(2))
    assert (seen.source, seen.step_seconds, seen.peak_bytes) == ("seen", pytest.approx(1.5, rel=0.02), 9)


def test_a_table_that_is_off_for_one_layout_is_mended_by_live_steps():
    """TP2 takes 30 % longer than the table says. After steps in both layouts every batch of TP2 does, DP2's do not."""
    rows = [row(n, 1.0 + 0.5 * n, layout) for layout in (DP2, TP2) for n in (2, 8)]
    throughput = Throughput(rows)
    before = throughput.error_beside(configuration(8, TP2), configuration(8))
    for _ in range(2):
        observed(throughput, configuration(4), 3.0)
        observed(throughput, configuration(4, TP2), 3.9)
    ours = [throughput.predict(configuration(n)).step_seconds for n in (2, 4, 8)]
    theirs = [throughput.predict(configuration(n, TP2)).step_seconds for n in (2, 4, 8)]
    assert ours[1] == pytest.approx(3.0, rel=0.02)
    assert theirs[1] == pytest.approx(3.9, rel=0.02)
    assert [t / o for t, o in zip(theirs, ours, strict=True)] == pytest.approx([1.3] * 3, rel=0.1)
    assert throughput.error_beside(configuration(4, TP2), configuration(4)) < before
    assert throughput.error_beside(configuration(8, TP2), configuration(8, TP2)) == 0


def test_predictions_stand_in_for_rows_and_are_corrected():
    guess = Prediction(step_seconds=1.0, error=0.2, source="predicted")
    throughput = Throughput([row(2, 3.0)], CostPredictions({configuration(2): guess, configuration(4): guess}))
    assert throughput.predict(configuration(2)).step_seconds == 3.0, "rows come first"
    assert throughput.predict(configuration(4)) == guess
    assert throughput.error_beside(configuration(4), configuration(2)) > 0.2
    observed(throughput, configuration(4), 1.5)
    seen = throughput.predict(configuration(4))
    assert (seen.source, seen.step_seconds) == ("seen", pytest.approx(1.5, rel=0.01))
    assert seen.error < 0.02


def test_a_step_tells_how_wrong_other_predictions_are_but_not_what_was_measured():
    guess = Prediction(step_seconds=1.0, error=0.6, source="predicted")
    expected = CostPredictions({configuration(n): guess for n in (2, 4, 8)}, lambda one, other: 0.35)
    throughput = observed(Throughput([row(2, 1.0)], expected), configuration(4), 0.5, 30)
    assert throughput.predict(configuration(4)).step_seconds == pytest.approx(0.5, rel=0.01)
    told = throughput.predict(configuration(8))
    assert told.step_seconds == pytest.approx(0.5, rel=0.1)
    assert told.error < 0.3
    # Of a step at half the time the run's offset (± 0.3) explains a fifth, the prediction (± 0.6) the rest.
    assert throughput.predict(configuration(2)).step_seconds == pytest.approx(0.5**0.2, rel=0.02)
    assert throughput.error_beside(configuration(8), configuration(4)) < 0.3


def test_what_the_job_taught_survives_a_checkpoint():
    first, resumed = Throughput([row(2, 1.0), row(4, 2.0)]), Throughput([row(2, 1.0), row(4, 2.0)])
    observed(first, configuration(2), 1.4, 7)
    observed(first, configuration(1, TP2), 9.0, 2)
    first.refuse(configuration(8), "out of memory")
    first.refuse(Layout(pp=2), "could not be built")
    resumed.restore(json.loads(json.dumps(first.state())))
    resumed.restore({})
    assert resumed.predict(configuration(8)).failure == "out of memory"
    assert resumed.predict(configuration(1, Layout(pp=2))).failure == "could not be built"
    for each in (configuration(2), configuration(4), configuration(1, TP2)):
        assert resumed.predict(each) == first.predict(each)


@pytest.mark.parametrize("rows", [[], [row(2, failure="out of memory")]])
def test_one_live_step_is_better_than_nothing_and_refutes_a_failure(rows):
    throughput = Throughput(rows)
    throughput.observe(configuration(2), 2.0)
    prediction = throughput.predict(configuration(2))
    assert (prediction.source, prediction.step_seconds, prediction.failure) == ("seen", 2.0, None)


def test_one_step_that_met_a_stalled_machine_changes_little():
    throughput = Throughput([row(1, 1.4)])
    for step in [1.4, 1.45, 1.35, 1.4, 1.45, 1.35, 1.4, 90.0]:
        throughput.observe(configuration(1), step)
    seen = throughput.predict(configuration(1))
    assert seen.step_seconds == pytest.approx(1.4, rel=0.05)
    assert seen.error < 0.05


def test_old_steps_are_forgotten():
    throughput = observed(Throughput(), configuration(1), 10.0, 50)
    observed(throughput, configuration(1), 1.0, 11)
    assert throughput.predict(configuration(1)).step_seconds == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_step_is_refused(step):
    with pytest.raises(ValueError, match="step_seconds"):
        Throughput().observe(configuration(1), step)


def test_a_configuration_without_memory_rules_out_larger_ones_of_its_layout():
    throughput = Throughput([row(n, 1.0 * n, micro_batch=m) for n in (1, 2, 4) for m in (1, 2)])
    throughput.observe(configuration(4), 1.0)
    throughput.refuse(configuration(2, micro_batch=1), "out of memory")
    assert throughput.predict(configuration(2)).failure == "out of memory"
    assert throughput.predict(configuration(3)).failure == "out of memory"
    assert throughput.predict(configuration(1, micro_batch=2)).failure == "out of memory", "as many sequences at once"
    assert throughput.predict(configuration(1)).failure is None
    assert throughput.predict(configuration(4)).failure is None, "it ran"
    throughput.refuse(configuration(1, micro_batch=4), "could not be built")
    assert throughput.predict(configuration(2, layout=TP2)) is None
