"""One accelerator as any rank of many: the shard is the one that the rank has, and its work is measured alone."""

import numpy as np
import pytest
import torch.distributed as dist
from test_profiles_table import HERE, MODEL

from copus.backends.base import StepRules
from copus.backends.megatron.backend import MegatronBackend
from copus.profiling.single import SingleProfiler, stage_ranks, world_of_one
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Measurement
from profiles.profiler import Task
from profiles.shards import steps_from_shards
from tests.megatron_jobs import backend_of, configuration, random_batches, tiny_job
from tests.ranks import run_ranks

RULES = StepRules(lr=0.0, betas=(0.9, 0.95))
LAYOUTS = [
    {"tp": 2, "sequence_parallel": True},
    {"pp": 2, "zero": 0},
    {"dp": 2, "zero": 1},
]


def _shapes(backend: MegatronBackend) -> dict[str, list[tuple[int, ...]]]:
    state = backend.live_state()
    return {str(place): [tuple(field.shape) for field in fields()] for place, fields in state.items()}


def _real(layouts: list[dict]) -> list[dict[str, list[tuple[int, ...]]]]:
    """The shapes of this rank in every layout."""
    found = []
    for layout in layouts:
        backend = backend_of(tiny_job(2, layout))
        backend.train_step(random_batches, 0, RULES, None, False)
        found.append(_shapes(backend))
        backend.close()
    return found


def _alone(layouts: list[dict]) -> list[list[dict[str, list[tuple[int, ...]]]]]:
    """The shapes of both ranks of every layout, in this one process."""
    dist.destroy_process_group()
    found = []
    for layout in layouts:
        found.append([])
        for rank in range(2):
            with world_of_one(2, rank):
                backend = backend_of(tiny_job(2, layout))
                result = backend.train_step(random_batches, 0, RULES, None, False)
                assert not result.skipped, "the optimizer ran"
                found[-1].append(_shapes(backend))
                backend.close()
    _world_again()
    return found


def _world_again() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.dist
def test_a_shard_alone_is_the_shard_of_that_rank_among_all() -> None:
    (alone,) = run_ranks(1, _alone, LAYOUTS)
    real = run_ranks(2, _real, LAYOUTS)
    for place, shapes in enumerate(alone):
        assert shapes == [of_rank[place] for of_rank in real]
        assert all(shapes)


def _measure() -> list[Measurement]:
    dist.destroy_process_group()
    job = tiny_job(64, {"tp": 2, "pp": 2, "dp": 16}, global_batch=32, evaluate_sequences=64)
    task = Task(job.model, job.cluster, HERE, job.profile, job=job)
    profiler = SingleProfiler(task)
    wanted = [
        configuration(32, 1, tp=2, pp=2, dp=16),
        configuration(64, 2, tp=4, pp=4, dp=4, zero=1),
        configuration(64, 1, pp=2, vp=2, dp=32, recompute="full"),
    ]
    rows = [profiler.measure(each) for each in wanted]
    _world_again()
    return rows


@pytest.mark.dist
def test_64_ranks_are_measured_by_one() -> None:
    (rows,) = run_ranks(1, _measure)
    for row in rows:
        assert row.shard
        assert row.failure is None
        assert row.step_seconds is not None
        assert row.count == 3
        assert row.configuration.layout.accelerators == 64


def test_the_first_and_the_last_stage_are_measured() -> None:
    assert stage_ranks(Layout(tp=2, dp=4)) == [0]
    assert stage_ranks(Layout(tp=2, pp=4, dp=2)) == [0, 15]


def shard(seconds: float, **layout: int) -> Measurement:
    return Measurement(
        fingerprint=HERE,
        model=MODEL,
        configuration=Configuration(layout=Layout(**layout), micro_batch=1, global_batch=8),
        step_seconds=seconds,
        shard=True,
        time=0.0,
    )


def test_the_network_is_added_and_the_bubble_grows_with_the_work() -> None:
    """Twice the predicted work: the bubble doubles, the network does not."""
    rows = [shard(2.0, pp=2), shard(3.0, dp=2)]
    parts = {
        "compute": [0.8, 3.0],
        "launch": [0.1, 0],
        "optimizer": [0.1, 0],
        "bubble": [0.25, 0],
        "tp": [0, 0],
        "dp": [0.5, 0.7],
    }
    breakdown = {name: np.array(values, dtype=float) for name, values in parts.items()}
    assert steps_from_shards(rows, breakdown) == pytest.approx([2.0 + 0.5 + 0.5, 3.7])


def test_what_is_no_shard_is_refused() -> None:
    breakdown = {"compute": np.ones(1)}
    with pytest.raises(ValueError, match="not the time of a shard"):
        steps_from_shards([shard(1.0).model_copy(update={"shard": False})], breakdown)
    with pytest.raises(ValueError, match="nothing that the shards' times could replace"):
        steps_from_shards([shard(1.0)], {"dp": np.ones(1)})


def test_options_are_refused() -> None:
    job = tiny_job(2)
    config = job.profile.model_copy(update={"options": {"steps": 3}})
    with pytest.raises(ValueError, match="takes none, got steps"):
        SingleProfiler(Task(job.model, job.cluster, HERE, config, job=job))
