"""The norm layers as a stand-in for the whole gradient, and which steps measure what."""

import json
from typing import Any

import numpy as np
import pytest

from copus.backends.step_contract import Parts, StepResult
from copus.noise.run_noise import RunNoise
from planner.backend_traits import ANY_BACKEND, BackendTraits, PartCount
from planner.config import PlannerConfig
from planner.noise_sources import split
from planner.sampling import (
    HalfLife,
    check_measurable,
    configuration_of_step,
    executed_configuration,
    half_life,
    noise_measurable,
    source_of_step,
)
from profiles.configuration import Configuration
from profiles.layout import Layout

BATCH = 8
B_SIMPLE, B_NORM = 40.0, 30.0


def _parts(rng: np.random.Generator, noise_scale: float, parts: int, size: int) -> Parts:
    gradient = np.full(50, 0.2)
    sigma = np.sqrt(noise_scale * float((gradient**2).sum()) / 50 / size)
    means = gradient + sigma * rng.normal(size=(parts, 50))
    return Parts((means**2).sum(axis=1), size, float((means.mean(axis=0) ** 2).sum()))


def _result(full: Parts | None, norm_layers: Parts | None, skipped: bool = False) -> StepResult:
    return StepResult(loss=1.0, grad_sq=1.0, parts=full, norm_layer_parts=norm_layers, skipped=skipped, stop=False)


def _run(steps: int, calibrate_every: int | None, seed: int = 0) -> RunNoise:
    """Norm layers on every step, both on some."""
    rng, meter = np.random.default_rng(seed), RunNoise(HalfLife(0, 400))
    for step in range(steps):
        both = calibrate_every is not None and step % calibrate_every == 0
        full = _parts(rng, B_SIMPLE, 2, 4) if both else None
        assert meter.update(_result(full, _parts(rng, B_NORM, 8, 1)), (step + 1) * BATCH, BATCH)
    return meter


def test_norm_layers_alone_are_unknown_and_not_a_number() -> None:
    meter = _run(400, None)
    noise = meter.estimate()
    assert (noise.value, noise.low, noise.high) == (None, None, None)
    assert meter.calibration is None


def test_calibrated_norm_layers_find_the_noise_scale_of_the_whole() -> None:
    meters = [_run(2000, 8, seed) for seed in range(5)]
    for wanted, seen in (
        (B_SIMPLE / B_NORM, [meter.calibration for meter in meters]),
        (B_SIMPLE, [meter.estimate().value for meter in meters]),
    ):
        assert np.exp(np.mean(np.log(np.array(seen, float)))) == pytest.approx(wanted, rel=0.15)
    noise = meters[0].estimate()
    assert noise.value == pytest.approx(noise.noise_trace / noise.grad_sq)
    assert noise.low is not None
    assert noise.low < B_SIMPLE


def test_the_interval_of_calibrated_norm_layers_covers_the_truth() -> None:
    covered = 0
    for seed in range(24):
        noise = _run(800, 4, seed).estimate()
        covered += noise.low is not None and noise.low <= B_SIMPLE <= (noise.high or np.inf)
    assert covered >= 19


def test_steps_that_are_not_finite_are_counted_and_change_nothing() -> None:
    meter = _run(1000, 8)
    before = meter.estimate()
    nan = Parts(np.array([np.nan, 1.0]), 4, 1.0)
    assert not meter.update(_result(nan, None), 1001 * BATCH, BATCH)
    assert not meter.update(_result(_parts(np.random.default_rng(0), 1.0, 2, 4), None, True), 1002 * BATCH, BATCH)
    assert meter.skipped == 2
    assert meter.estimate() == before


def test_a_step_without_parts_says_nothing() -> None:
    meter = RunNoise(HalfLife(0, 100))
    assert not meter.update(_result(None, None), BATCH, BATCH)
    assert (meter.skipped, meter.estimate().samples, meter.estimate().value) == (0, 0, None)


def test_a_checkpoint_of_a_version_without_a_clock_is_measured_anew() -> None:
    meter = RunNoise(HalfLife(0, 100))
    old = {"blocks": [[0, 512, 512, 3.0, 1, 2.0]], "samples": 1, "tokens_seen": 512}
    calibration = {"pairs_per_block": 1, "blocks": []}
    meter.restore({"full": old, "norm_layers": old, "calibration": calibration, "skipped": 3})
    assert meter.estimate().samples == 0
    assert meter.update(_result(_parts(np.random.default_rng(0), 1.0, 2, 4), None), 1000 * BATCH, BATCH)
    assert meter.estimate().samples == 1


def test_the_half_life_follows_the_job_unless_it_is_set() -> None:
    planner, seq_len = PlannerConfig(), 1000
    assert half_life(planner, 1_000_000, seq_len).at(8) == 20_000  # 2 %
    assert half_life(planner, 1_000_000, seq_len).at(1024) == 102_400  # 100 steps
    planner = PlannerConfig(noise_half_life_tokens=500_000)
    assert half_life(planner, 1_000_000, seq_len).at(8) == 500
    assert half_life(planner, 1_000_000, seq_len).at(1024) == 20_480  # 20 steps


def test_state_goes_through_json_and_back() -> None:
    meter = _run(800, 8)
    again = RunNoise(HalfLife(0, 400))
    again.restore(json.loads(json.dumps(meter.state())))
    assert again.estimate() == meter.estimate()
    assert again.calibration == meter.calibration
    rng = np.random.default_rng(5)
    result = _result(_parts(rng, B_SIMPLE, 2, 4), _parts(rng, B_NORM, 8, 1))
    for each in (meter, again):
        each.update(result, 801 * BATCH, BATCH)
    assert again.estimate() == meter.estimate()


def _sources(steps: int, dp: int, micro_batch: int, batch: int, **settings: Any) -> list[str | None]:
    configuration = Configuration(layout=Layout(dp=dp), micro_batch=micro_batch, global_batch=batch)
    planner = PlannerConfig(**{"min_noise_samples": 1, **settings})
    return [source_of_step(planner, ANY_BACKEND, configuration, step) for step in range(steps)]


class _Reduced(BackendTraits):
    """Reduces every micro-batch over the replicas, as ZeRO 2 may: a part is a micro-batch of all replicas."""

    def parts(self, configuration: Configuration) -> dict[str, PartCount]:
        return {
            "microbatch": PartCount(configuration.num_microbatches, configuration.layout.dp * configuration.micro_batch)
        }


class _ReplicasAlone(BackendTraits):
    """Measures whole replicas alone."""

    def parts(self, configuration: Configuration) -> dict[str, PartCount]:
        return {"replica": super().parts(configuration)["replica"]}


def test_steps_measure_what_the_backend_has() -> None:
    settings = PlannerConfig(min_noise_samples=1, noise_every_steps=2, noise_halve_every_steps=2)
    several, lone, odd = (
        Configuration(layout=Layout(dp=2), micro_batch=size, global_batch=batch)
        for size, batch in ((2, 8), (2, 4), (1, 2))
    )
    reduced, replicas = _Reduced(), _ReplicasAlone()
    assert [source_of_step(settings, reduced, several, step) for step in range(3)] == ["microbatch", None, "microbatch"]
    assert [source_of_step(settings, reduced, lone, step) for step in range(3)] == ["microbatch", None, "microbatch"]
    assert executed_configuration(reduced, lone, "microbatch") == lone.halved, "one micro-batch of both replicas"
    assert executed_configuration(ANY_BACKEND, lone, "microbatch") == lone, "one of either replica"
    assert [source_of_step(settings, replicas, several, step) for step in range(2)] == ["replica", "replica"]
    compares_replicas = settings.model_copy(update={"noise_source": "replica"})
    assert source_of_step(compares_replicas, reduced, several, 0) is None
    assert [noise_measurable(settings, reduced, each) for each in (several, lone, odd)] == [True, True, True]
    norm_test = settings.model_copy(update={"policy": "norm-test"})
    assert not noise_measurable(norm_test, reduced, odd), "it judges steps of that batch"
    assert [noise_measurable(settings, replicas, each) for each in (several, lone, odd)] == [True, True, True]
    why = r"noise_source\(normlayer\): with TP1·PP1·DP2 B8 m2 this backend measures replica: policy"
    with pytest.raises(ValueError, match=why):
        check_measurable(settings.model_copy(update={"noise_source": "normlayer"}), replicas, several)


def test_one_sequence_is_compared_with_a_second_one_on_sampled_steps() -> None:
    one, two, three, even = (Configuration(layout=Layout(), micro_batch=n, global_batch=n) for n in (1, 2, 3, 4))
    pair = one.model_copy(update={"global_batch": 2})
    for source in ("auto", "microbatch", "normlayer"):
        settings = PlannerConfig(min_noise_samples=2, noise_every_steps=3, noise_source=source)
        steps = [configuration_of_step(settings, ANY_BACKEND, one, step) for step in range(7)]
        assert steps == [pair, pair, one, pair, one, one, pair]
        assert source_of_step(settings, ANY_BACKEND, pair, 0) is not None
        assert source_of_step(settings, ANY_BACKEND, pair, 3) is not None
        assert configuration_of_step(settings, ANY_BACKEND, three, 0).num_microbatches == 2
        assert [configuration_of_step(settings, ANY_BACKEND, each, 0) for each in (two, even)] == [two, even]
    for policy in ("static", "smallest-saturating", "norm-test"):
        assert configuration_of_step(PlannerConfig(policy=policy), ANY_BACKEND, one, 0) == one
    replicas = Configuration(layout=Layout(dp=2), micro_batch=1, global_batch=2)
    assert configuration_of_step(PlannerConfig(), ANY_BACKEND, replicas, 0) == replicas


def test_which_steps_measure_what() -> None:
    both = "microbatch+normlayer"
    assert _sources(5, 2, 2, 8, noise_every_steps=4) == [both, "replica", "replica", "replica", both]
    assert _sources(3, 1, 2, 8, noise_every_steps=2) == [both, None, both]
    assert _sources(3, 1, 8, 8, noise_halve_every_steps=2) == [both, None, both]
    each = {"noise_every_steps": 1, "noise_halve_every_steps": 2}
    assert _sources(3, 1, 8, 8, **each) == [both, "normlayer", both]
    assert _sources(3, 2, 2, 8, noise_source="normlayer", **each) == [both, "normlayer", both]
    assert _sources(5, 1, 8, 8, noise_every_steps=2, noise_halve_every_steps=4) == [both, None, "normlayer", None, both]
    first = {"min_noise_samples": 2, "noise_every_steps": 4, "noise_halve_every_steps": 8}
    assert _sources(5, 1, 8, 8, **first) == [both, both, None, None, "normlayer"]
    assert _sources(5, 2, 2, 8, **first) == [both, both, "replica", "replica", both]
    assert _sources(2, 1, 8, 8, noise_source="microbatch") == ["microbatch"] * 2
    assert _sources(2, 2, 2, 8, noise_source="replica") == ["replica"] * 2


def test_names_of_sources() -> None:
    assert split(None) == (None, False)
    assert split("microbatch+normlayer") == ("microbatch", True)
    assert split("normlayer") == (None, True)
    for wrong in ("microbatch+replica", "sequence", "normlayer+normlayer"):
        with pytest.raises(ValueError, match="noise source"):
            split(wrong)
