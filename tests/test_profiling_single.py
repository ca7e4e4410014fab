"""One accelerator as any rank of many: the shard is the one that the rank has, and its work is measured alone."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from launch_jobs import copus_here, write_job
from test_planner_decision import noise
from test_profiles_table import HERE

from copus.backends.megatron.backend import MegatronBackend
from copus.backends.step_contract import StepRequest, StepRules
from copus.job import JobError, load_job
from copus.planning import Planner
from copus.profiling.single import SingleProfiler, stage_ranks
from copus.profiling.solo import world_of_one
from launch.engines import LocalEngine
from launch.profile import check_profiler
from profiles.layout import Layout
from profiles.measurement import Measurement
from profiles.profiler import Task
from profiles.table import ThroughputTable
from tests.megatron_jobs import backend_of, configuration, random_batches, tiny_job
from tests.ranks import run_ranks

RULES = StepRules(lr=0.0, betas=(0.9, 0.95))
LAYOUTS = [
    {"tp": 2, "sequence_parallel": True},
    {"pp": 2, "zero": 0},
    {"dp": 2, "zero": 1},
]


def _shapes(backend: MegatronBackend) -> dict[str, tuple[int, ...]]:
    return {str(place): tuple(tensor().shape) for place, tensor in backend.live_state().items()}


def _real(layouts: list[dict]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of this rank in every layout."""
    found = []
    for layout in layouts:
        backend = backend_of(tiny_job(2, layout))
        backend.train_step(random_batches, StepRequest(0, RULES))
        found.append(_shapes(backend))
        backend.close()
    return found


def _alone(layouts: list[dict]) -> list[list[dict[str, tuple[int, ...]]]]:
    """The shapes of both ranks of every layout, in this one process."""
    dist.destroy_process_group()
    found = []
    for layout in layouts:
        found.append([])
        for rank in range(2):
            with world_of_one(2, rank):
                backend = backend_of(tiny_job(2, layout))
                result = backend.train_step(random_batches, StepRequest(0, RULES))
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


@pytest.mark.dist
def test_a_cluster_is_planned_from_one_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`copus profile run` in one process, then `copus plan` and the planner of a job that trains: 4 ranks, nothing of
    them was there."""
    small = {"layers": 2, "hidden": 32, "ffn_hidden": 48, "heads": 4, "kv_heads": 4, "seq_len": 16, "vocab": 250}
    file = write_job(
        tmp_path,
        model=small,
        cluster={"accelerators_per_node": 4},
        training={"layout": {"tp": 2, "dp": 2}, "global_batch": 4},
        planner={
            "policy": "goodput",
            "min_global_batch": 4,
            "max_global_batch": 8,
            "max_micro_batch": 1,
            "layouts": [{"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}, {"dp": 4}],
        },
        profile={"profiler": "single", "warmup_steps": 1, "steps": 2},
    )
    monkeypatch.chdir(tmp_path)
    assert copus_here("plan", str(file), "--json") == 0
    before = json.loads(capsys.readouterr().out)
    assert copus_here("profile", "run", str(file), "--json") == 0
    assert json.loads(capsys.readouterr().out)["measured"] > 0
    assert copus_here("plan", str(file), "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert (after["measured_rows"], after["measured_shards"]) == (0, 6)
    assert "shards timed alone" in " ".join(after["assumptions"])

    # How sure a prediction is depends on how much the times scatter; that it was learnt from them does not.
    seconds, blind = ([each["step_seconds"] for each in found["candidates"]] for found in (after, before))
    assert all(now != pytest.approx(then) for now, then in zip(seconds, blind, strict=True))
    job = load_job(file)
    rows = ThroughputTable(job.profile.table).everything()
    planner = Planner(job, rows, 0)
    times = {each["label"]: each["step_seconds"] for each in after["candidates"]}
    decision = planner.decide(noise(16.0, 12.0, 20.0), job.training.configuration, 1000)
    assert {score.source for score in decision.candidates} == {"predicted"}
    assert {score.configuration.label: score.step_seconds for score in decision.candidates} == pytest.approx(times)


def test_only_goodput_trains_on_what_one_accelerator_said() -> None:
    job = tiny_job(2)
    single = job.model_copy(update={"profile": job.profile.model_copy(update={"profiler": "single"})})
    with pytest.raises(JobError, match=r"planner\.policy\(copus\) needs measured steps: set planner\.policy: goodput"):
        check_profiler(single, LocalEngine())
    goodput = single.model_copy(update={"planner": job.planner.model_copy(update={"policy": "goodput"})})
    check_profiler(goodput, LocalEngine())


def test_options_are_refused() -> None:
    job = tiny_job(2)
    config = job.profile.model_copy(update={"options": {"steps": 3}})
    with pytest.raises(ValueError, match="takes none, got steps"):
        SingleProfiler(Task(job.model, job.cluster, HERE, config, job=job))
