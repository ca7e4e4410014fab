"""The noise scale is known soon, whatever the size of a step and the length of a job, and its interval holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.noise_known import JOB, SOURCES, WANTED, cell_of, cells, main, measure, simulate_job
from benchmarks.noise_synthetic import SyntheticSteps
from copus.job import load_job
from copus.noise.run_noise import RunNoise
from planner.backend_traits import ANY_BACKEND
from planner.sampling import half_life, source_of_step


@given(
    seq_len=st.sampled_from([2**power for power in range(4, 17)]),
    global_batch=st.sampled_from([2**power for power in range(1, 14)]),
    source=st.sampled_from(SOURCES),
    job_steps=st.integers(WANTED, 10**7),
    half_life_tokens=st.none() | st.integers(1, 10**12),
    noise_over_batch=st.floats(0.1, 1.5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_known_within_25_measured_steps_at_every_scale(
    seq_len: int,
    global_batch: int,
    source: str,
    job_steps: int,
    half_life_tokens: int | None,
    noise_over_batch: float,
    seed: int,
) -> None:
    cell = cell_of(seq_len, global_batch, source)
    planner = cell.settings.model_copy(update={"noise_half_life_tokens": half_life_tokens})
    meter = RunNoise(half_life(planner, job_steps * global_batch, seq_len))
    steps, measured, step = SyntheticSteps(np.random.default_rng(seed)), 0, 0
    while measured < WANTED:
        source = source_of_step(planner, ANY_BACKEND, cell.configuration, step)
        result = steps.step(cell.configuration, source, noise_over_batch * global_batch)
        step += 1
        measured += meter.update(result, step * global_batch, global_batch)
    noise = meter.estimate()
    assert noise.value is not None
    assert noise.low is not None
    assert noise.low <= noise.value
    assert noise.samples >= planner.min_noise_samples
    assert noise.centroid is not None
    assert 0 < noise.centroid < step * global_batch


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Nominally 90 %, over sizes of steps and sources; 420 runs tell it to 1.5 %."""
    rows = [measure(cell, 20, 60) for cell in cells()]
    assert all(row["steps_until_known"] is not None and row["steps_until_known"] <= WANTED for row in rows)
    assert 85 <= np.mean([row["coverage_pct"] for row in rows]) <= 95
    assert 85 <= np.mean([row["coverage_later_pct"] for row in rows]) <= 95


@pytest.mark.parametrize("global_batch", [64, 1024])
def test_the_example_for_h100s_knows_its_noise_scale_and_moves(global_batch: int) -> None:
    seen = simulate_job(load_job(JOB, ["training.tokens=200_000_000"]), global_batch)
    assert seen["measured_steps_until_known"] <= WANTED
    assert seen["unknown_decisions"] <= seen["first_known_decision"], "once known it stays known"
    assert abs(seen["critical_batch_bias_pct"]) < 25
    assert seen["moves"]


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.noise_known.STEP_SIZES", ((16, 4),))
    assert main(["--quick", "--json", "--only", "cells"]) == 0
    assert '"steps_until_known"' in capsys.readouterr().out
