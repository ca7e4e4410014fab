"""One predictor: the time of a step as the job runs it, and what may be chosen."""

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_planner_decision import CLUSTER, DP2, MODEL, START, TP2, config, noise, planner, row

from benchmarks.live_profiler import make_job
from planner.backend_traits import ANY_BACKEND
from planner.config import PlannerConfig
from planner.predictor import Predictor
from planner.sampling import executed_configuration, halved_share, source_of_step, typical_configuration
from planner.space import candidates
from profiles.configuration import Configuration
from profiles.throughput import CostPredictions, Prediction, Throughput, relative_spread

LONE = Configuration(layout=TP2, micro_batch=2, global_batch=2)
HALVES = Configuration(layout=TP2, micro_batch=1, global_batch=2)
SHARED = Configuration(layout=DP2, micro_batch=1, global_batch=2)


def step_time(throughput: Throughput, settings: PlannerConfig, configuration: Configuration) -> Prediction | None:
    return Predictor(settings, MODEL, CLUSTER, "fp32", START, throughput).step_time(configuration)


@pytest.mark.parametrize("source", ["auto", "normlayer", "microbatch", "replica"])
@pytest.mark.parametrize("every", [1, 4, 32])
def test_the_share_is_that_of_the_steps_that_are_halved(source: str, every: int) -> None:
    settings = config(noise_source=source, noise_halve_every_steps=every, min_noise_samples=1)
    for each in (LONE, HALVES, SHARED):
        steps = [source_of_step(settings, ANY_BACKEND, each, step) for step in range(64, 128)]
        halved = [executed_configuration(ANY_BACKEND, each, source) != each for source in steps]
        assert halved_share(settings, ANY_BACKEND, each) == sum(halved) / len(halved)


def test_a_step_takes_what_it_takes_on_average() -> None:
    throughput = Throughput([row(LONE, step_seconds=1.0), row(HALVES, step_seconds=1.8)])

    def seconds(**settings: object) -> float | None:
        known = step_time(throughput, config(**settings), LONE)
        return known and known.step_seconds

    assert seconds(noise_halve_every_steps=1) == pytest.approx(1.8)
    assert seconds(noise_halve_every_steps=4) == pytest.approx(1.2)
    assert seconds(noise_source="microbatch") == pytest.approx(1.8)
    assert seconds(noise_source="replica") == pytest.approx(1.0)
    assert step_time(throughput, config(), HALVES) == throughput.predict(HALVES)


def test_what_fails_fails_and_what_is_unknown_is_no_reason() -> None:
    settings = config(noise_halve_every_steps=1)
    alone = Throughput([row(LONE, step_seconds=1.0)])
    assert step_time(alone, settings, LONE) == alone.predict(LONE)
    failing = Throughput([row(LONE, failure="out of memory"), row(HALVES, step_seconds=1.0)])
    known = step_time(failing, settings, LONE)
    assert known is not None
    assert known.failure == "out of memory"
    assert step_time(Throughput(), settings, LONE) is None


def test_the_steps_that_are_timed_are_those_of_the_halves() -> None:
    assert typical_configuration(config(noise_halve_every_steps=1), ANY_BACKEND, LONE) == HALVES
    assert typical_configuration(config(noise_halve_every_steps=32), ANY_BACKEND, LONE) == LONE
    assert typical_configuration(config(noise_halve_every_steps=1), ANY_BACKEND, SHARED) == SHARED


def test_a_batch_that_is_fast_only_in_one_piece_is_not_chosen_where_it_never_runs_so() -> None:
    """In one piece the lone micro-batch is the fastest, in halves the slowest."""
    times = {LONE: 1.0, HALVES: 1.8, SHARED: 1.2}
    whole = planner(times, start=SHARED, policy="copus", noise_halve_every_steps=1000)
    assert whole.decide(noise(2.0, 1.9, 2.1), SHARED, 0).chosen == LONE
    halves = planner(times, start=SHARED, policy="copus", noise_halve_every_steps=1)
    decision = halves.decide(noise(2.0, 1.9, 2.1), SHARED, 0)
    assert decision.chosen == SHARED
    (lone,) = [score for score in decision.candidates if score.configuration == LONE]
    assert lone.step_seconds == pytest.approx(1.8)


def test_what_ran_in_halves_alone_has_shown_that_it_fits() -> None:
    predicted = {each: Prediction(step_seconds=1.0, source="predicted") for each in (LONE, HALVES)}
    throughput = Throughput(unmeasured=CostPredictions(predicted))
    for source, every, seen in (("microbatch", 32, True), ("auto", 32, False)):
        settings = config(noise_source=source, noise_halve_every_steps=every)
        before = step_time(throughput, settings, LONE)
        assert before is not None
        assert not before.memory_seen
        throughput.observe(HALVES, 1.0)
        after = step_time(throughput, settings, LONE)
        assert after is not None
        assert after.memory_seen == seen
        throughput = Throughput(unmeasured=CostPredictions(predicted))


def test_a_kept_hash_is_that_of_the_values() -> None:
    """Copies with other values, pickles and records read back hash as fresh ones do."""
    assert hash(LONE) == hash(LONE)
    changed = LONE.model_copy(update={"micro_batch": 1})
    assert changed == HALVES
    assert hash(changed) == hash(HALVES)
    assert hash(LONE) == hash(Configuration.model_validate_json(LONE.model_dump_json()))
    assert pickle.loads(pickle.dumps(LONE)) == LONE
    assert {LONE: 1}[copy.copy(LONE)] == 1


RESULTS = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*-live-profiler*.json"))


def left_out(result: Path, first: int) -> list[tuple[float, float]]:
    """Every ninth configuration that one machine has measured, from the others: by how much the prediction is off, and
    its error; as logarithms."""
    told = json.loads(result.read_text())
    job = make_job(max(int(row["configuration"].split(" B")[1].split()[0]) for row in told["rows"]))
    space = {c.label: c for c in candidates(job.planner, job.model, job.cluster, job.training.configuration)}
    rows = [
        row(space[each["configuration"]], step_seconds=one["step_seconds"]).model_copy(
            update={"spread_seconds": one["spread_seconds"], "count": told["steps"], "model": job.model}
        )
        for each in told["rows"]
        for one in _as_list(each.get("one job") or each["one_job"])
    ]
    measured = {each.configuration: each.step_seconds or 0.0 for each in rows}
    out = list(measured)[first::9]
    known = [each for each in rows if each.configuration not in out]
    predictor = Predictor.from_rows(
        job.planner, job.model, job.cluster, "fp32", job.training.configuration, known, besides=out
    )
    found = []
    for configuration in out:
        prediction = predictor.throughput.predict(configuration)
        assert prediction is not None
        assert prediction.step_seconds is not None
        found.append((math.log(measured[configuration] / prediction.step_seconds), prediction.error))
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.mark.slow
def test_after_24_measured_configurations_the_others_are_not_known_to_150_percent() -> None:
    """Six profiles of four ranks on two cores, where who shares a core with whom matters, which no formula knows: the
    predictions are off by 15 %, the intervals are 15 % wide and hold 59 % instead of 80 %."""
    found = [
        each for place, result in enumerate(RESULTS) for k in (0, 3, 6) for each in left_out(result, (place + k) % 9)
    ]
    assert len(found) == 54
    assert max(error for _, error in found) < 0.25
    assert np.mean([relative_spread(error) for _, error in found]) < 0.2
    assert np.std([off for off, _ in found]) < 0.2
    assert np.mean([abs(off) < 1.2816 * error for off, error in found]) > 0.5
