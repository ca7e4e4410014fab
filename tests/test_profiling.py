"""Measuring before training: what is run, what is written, and jobs shorter than the batches that are measured."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_profiles_table import HERE, MODEL

import copus.profiling.live as live_module
from copus.backends.megatron import backend as backend_module
from copus.backends.megatron import step as megatron_step
from copus.backends.megatron.backend import MegatronBackend
from copus.backends.step_contract import StepResult
from copus.estimate import predictor_of
from copus.events import Profile
from copus.job import JobConfig
from copus.profiling.live import LiveProfiler, profile_missing
from planner.backend_traits import ANY_BACKEND
from planner.config import PlannerConfig
from profiles.cluster import Cluster
from profiles.config import ProfileConfig
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Measurement
from profiles.model_shape import ModelShape
from profiles.profiler import Task
from profiles.table import ThroughputTable
from profiles.throughput import Throughput
from tests.megatron_jobs import random_batches, tiny_job
from tests.ranks import own_device, run_ranks


def _job(table: Path) -> JobConfig:
    """40 sequences, and batches up to 32 of them are measured."""
    job = tiny_job(2, {"tp": 2}, global_batch=4, tokens=16 * 40)
    planner = job.planner.model_copy(update={"max_global_batch": 32, "max_micro_batch": 4, "min_global_batch": 4})
    profile = job.profile.model_copy(update={"table": table, "steps": 2, "rounds": 1})
    return job.model_copy(update={"planner": planner, "profile": profile})


def _profile(table: Path) -> tuple[list[Profile], list[Measurement]]:
    job = _job(table)
    backend = MegatronBackend(job, own_device())

    def batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert first + count <= job.total_samples, "no sequence beyond the run"
        return random_batches(first, count)

    events: list[Profile] = []
    profile_missing(job, table.parent, backend, batches, events.append, lambda: False)
    return events, ThroughputTable(table).rows(backend.fingerprint())


def _cramped(table: Path) -> list[Measurement]:
    """What is measured if rank 1 has no memory to build tensor parallelism, nor rank 0 for steps of micro-batches of
    4."""
    job = _job(table)
    backend = MegatronBackend(job, own_device())
    build, gradients = backend_module.build_model, megatron_step.compute_gradients

    def build_model(shape: ModelShape, layout: Layout, *others: Any) -> Any:
        if layout.tp == 2 and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(shape, layout, *others)

    def compute_gradients(*arguments: Any) -> StepResult:
        if backend.configuration.micro_batch == 4 and dist.get_rank() == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients(*arguments)

    backend_module.build_model, megatron_step.compute_gradients = build_model, compute_gradients
    profile_missing(job, table.parent, backend, random_batches, lambda event: None, lambda: False)
    return ThroughputTable(table).rows(backend.fingerprint())


def test_the_old_layout_is_no_part_of_a_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the live profiler does before it times: the peak begins anew when the new layout stands."""
    job, done = _job(tmp_path / "table.jsonl"), list[str]()
    start = job.training.configuration
    monkeypatch.setattr(live_module, "reset_peak_memory", lambda: done.append("reset"))
    backend = SimpleNamespace(
        is_built=True,
        configuration=start,
        description=ANY_BACKEND,
        build=lambda configuration: done.append("build"),
        move=lambda configuration: done.append("move"),
        train_step=lambda *request: done.append("step"),
    )
    profiler = LiveProfiler(Task(job.model, job.cluster, HERE, job.profile, backend, job))
    profiler._configure(start.model_copy(update={"layout": Layout(pp=2)}))
    assert done[:2] == ["build", "reset"]
    assert "step" in done


@pytest.mark.dist
def test_profiling_goes_on_in_the_same_processes_when_a_rank_runs_out_of_memory(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    rows = run_ranks(2, _cramped, table)[0]
    failed = {row.configuration for row in rows if row.failure}
    assert {each.layout.tp for each in failed if each.micro_batch < 4} == {2}
    known = Throughput(rows)
    job = _job(table)
    for candidate in predictor_of(job, []).candidates:
        prediction = known.predict(candidate)
        assert prediction is not None, candidate.label
        assert (prediction.failure is not None) == (candidate.layout.tp == 2 or candidate.micro_batch == 4)


@pytest.mark.dist
@pytest.mark.slow
def test_the_table_predicts_every_candidate_afterwards(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    events, rows = run_ranks(2, _profile, table)[0]
    assert len(events) == len(rows) == events[0].total > 0
    job, throughput = _job(table), Throughput(rows)
    for candidate in predictor_of(job, []).candidates:
        prediction = throughput.predict(candidate)
        assert prediction is not None, candidate.label
        assert prediction.step_seconds is not None
        assert prediction.peak_bytes is not None
    again, _ = run_ranks(2, _profile, table)[0]
    assert again == [], "what the table has is not measured again"


class Noted:
    """A backend that notes what it is asked for."""

    device = torch.device("cpu")
    description = ANY_BACKEND

    def __init__(self) -> None:
        self.is_built = False
        self.said: list[str] = []

    def build(self, configuration: Configuration) -> None:
        self.is_built = True
        self.said.append("build")
        self.configuration = configuration

    def move(self, configuration: Configuration) -> None:
        self.configuration = configuration

    def train_step(self, *_: Any) -> None:
        self.said.append(f"B{self.configuration.global_batch}")


def test_warm_up_steps_are_short_and_left_out_where_only_the_number_of_micro_batches_changes() -> None:
    backend, config = Noted(), ProfileConfig(warmup_steps=2, steps=3)
    job = SimpleNamespace(planner=PlannerConfig())
    task = Task(MODEL, Cluster(accelerators_per_node=2), HERE, config, backend=backend, job=job)

    def said(layout: Layout, micro_batch: int, global_batch: int) -> list[str]:
        backend.said.clear()
        configuration = Configuration(layout=layout, micro_batch=micro_batch, global_batch=global_batch)
        assert profiler.measure(configuration).count == 3
        return backend.said

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        profiler = LiveProfiler(task)
        assert said(Layout(pp=2), 1, 8) == ["build", "B2", "B2", "B8", "B8", "B8"]
        assert said(Layout(pp=2), 1, 4) == ["B4", "B4", "B4"]
        assert said(Layout(pp=2), 2, 2) == ["B2", "B2", "B2", "B2", "B2"]
        assert said(Layout(dp=2), 2, 8) == ["build", "B4", "B4", "B8", "B8", "B8"]
    finally:
        dist.destroy_process_group()
