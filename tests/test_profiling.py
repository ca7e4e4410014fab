"""Measuring before training: what is run, what is written, and jobs shorter than the batches that are measured."""

from pathlib import Path

import pytest
import torch

from copus.backends.megatron.backend import MegatronBackend
from copus.events import Profile
from copus.job import JobConfig
from copus.profiling.live import profile_missing
from planner.space import candidates
from profiles.measurement import Measurement
from profiles.table import ThroughputTable
from profiles.throughput import Throughput
from tests.megatron_jobs import random_batches, tiny_job
from tests.ranks import run_ranks


def _job(table: Path) -> JobConfig:
    """40 sequences, and batches up to 32 of them are measured."""
    job = tiny_job(2, {"tp": 2}, global_batch=4, tokens=16 * 40)
    planner = job.planner.model_copy(update={"max_global_batch": 32, "max_micro_batch": 4, "min_global_batch": 4})
    profile = job.profile.model_copy(update={"table": table, "steps": 2, "rounds": 1})
    return job.model_copy(update={"planner": planner, "profile": profile})


def _profile(table: Path) -> tuple[list[Profile], list[Measurement]]:
    job = _job(table)
    backend = MegatronBackend(job, torch.device("cpu"))

    def batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert first + count <= job.total_samples, "no sequence beyond the run"
        return random_batches(first, count)

    events: list[Profile] = []
    profile_missing(job, table.parent, backend, batches, events.append, lambda: False)
    return events, ThroughputTable(table).rows(backend.fingerprint())


@pytest.mark.dist
def test_the_table_predicts_every_candidate_afterwards(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    events, rows = run_ranks(2, _profile, table)[0]
    assert len(events) == len(rows) == events[0].total > 0
    job, throughput = _job(table), Throughput(rows)
    for candidate in candidates(job.planner, job.model, job.cluster, job.training.configuration):
        prediction = throughput.predict(candidate)
        assert prediction is not None, candidate.label
        assert prediction.step_seconds is not None
        assert prediction.peak_bytes is not None
    again, _ = run_ranks(2, _profile, table)[0]
    assert again == [], "what the table has is not measured again"
