"""Things that go wrong in a job of several ranks: moves that fail, disks that fill up, other numbers of ranks."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus import resume, worker
from copus.backends.megatron import backend as megatron_backend
from copus.backends.megatron import step as megatron_step
from copus.backends.megatron.backend import MegatronBackend
from copus.backends.step_contract import StepRequest
from copus.checkpoints import sharded
from copus.checkpoints.store import Writing, newest_checkpoint
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import RankError, broadcast_from_rank0, run_on_all_ranks
from copus.event_log import EventLog
from copus.events import Checkpoint, DecisionMade, Event, Failure, Reconfigure, Step
from copus.job import JobError
from copus.loop import Trainer
from copus.resize import resized
from copus.user_errors import report_failure
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.table import ThroughputTable
from profiles.throughput import Throughput
from tests.eager_planner import EagerPlanner
from tests.megatron_jobs import RULES, backend_of, configuration, random_batches, tiny_job
from tests.ranks import own_device, run_ranks


def _agree() -> tuple[Any, str, bool]:
    rank = dist.get_rank()

    def fails() -> None:
        if rank == 1:
            raise torch.OutOfMemoryError("no\nroom")

    try:
        run_on_all_ranks(fails)
    except RankError as error:
        return run_on_all_ranks(lambda: broadcast_from_rank0(rank + 7)), str(error), error.out_of_memory
    raise AssertionError("nobody was told")


@pytest.mark.dist
def test_what_fails_on_one_rank_fails_on_all() -> None:
    assert run_ranks(3, _agree) == [(7, "rank 1: OutOfMemoryError: no room", True)] * 3


def _fails_on(rank: int, layout: Any, place: str, error: Exception) -> None:
    """From now on building `layout` fails on a rank, when the model or when the optimizer has been made."""
    owner = megatron_backend if place == "build_model" else MegatronBackend
    original = getattr(owner, place)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if dist.get_rank() == rank and layout in arguments:
            raise error
        return result

    setattr(owner, place, wrapped)


def _failing_move(layouts: list[dict[str, Any]], place: str | None) -> tuple[list[float], str]:
    """Losses around a move that fails on rank 1, or, without a place, that nobody tries."""
    backend = backend_of(tiny_job(dist.get_world_size(), layouts[0], micro_batch=2))
    after = configuration(8, 2, **layouts[1])
    losses, said = [], ""
    for step in range(6):
        if step == 3 and place is not None:
            _fails_on(1, after.layout, place, torch.OutOfMemoryError("no room"))
            with pytest.raises(RankError) as caught:
                backend.move(after)
            said = str(caught.value)
            assert caught.value.out_of_memory
            assert backend.configuration.layout != after.layout
        losses.append(backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss)
    assert backend.optimizer_steps == 6
    return losses, said


@pytest.mark.dist
@pytest.mark.parametrize("layouts", [[{"tp": 2}, {"dp": 2}], [{"dp": 2, "zero": 1}, {"pp": 2}]])
@pytest.mark.parametrize("place", ["build_model", "_make_optimizer"])
def test_a_move_that_fails_on_one_rank_happens_on_none(layouts: list[dict[str, Any]], place: str) -> None:
    steady = run_ranks(2, _failing_move, layouts, None)
    for (losses, said), (expected, _) in zip(run_ranks(2, _failing_move, layouts, place), steady, strict=True):
        assert losses == expected, "to the bit: nothing was lost or rounded on the way there and back"
        assert "rank 1: OutOfMemoryError: no room" in said


def _train(run: Path, table: Path, ruin: str | None) -> list[Event]:
    settings = {"global_batch": 4, "tokens": 16 * 96, "micro_batch": 1, "checkpoint_every_tokens": 16 * 32}
    job = tiny_job(2, {"tp": 2}, **settings)
    limits = {"every_samples": 24, "max_global_batch": 8, "max_micro_batch": 2}
    job = job.model_copy(
        update={
            "planner": job.planner.model_copy(update=limits),
            "profile": job.profile.model_copy(update={"table": table}),
        }
    )
    backend = backend_of(job)
    after = configuration(4, 1, dp=2)
    if ruin == "move":
        _fails_on(1, after.layout, "_make_optimizer", torch.OutOfMemoryError("no room"))
    if ruin == "disk":
        _full_disk()
    planner = EagerPlanner(job, after) if dist.get_rank() == 0 else None
    events: list[Event] = []

    if ruin == "memory":
        _no_room_for_the_update(after)

    trainer = Trainer(
        job,
        run,
        backend,
        random_batches,
        random_batches,
        planner if ruin in ("move", "memory") else planner and planner.real,  # type: ignore[arg-type]
        TrainerState(),
        events.append,
        lambda: False,
    )
    assert trainer.train() == "finished"
    return events


@pytest.mark.dist
def test_training_goes_on_after_a_failed_move_and_does_not_try_it_again(tmp_path: Path) -> None:
    events = run_ranks(2, _train, tmp_path, tmp_path / "table.jsonl", "move")[0]
    failures = [event for event in events if isinstance(event, Failure)]
    assert len(failures) == 1, "tried once"
    assert not failures[0].fatal
    assert "TP1·PP1·DP2" in failures[0].message
    assert "out of memory" in failures[0].message.lower() or "OutOfMemory" in failures[0].message
    assert not any(isinstance(event, Reconfigure) for event in events)
    assert len([event for event in events if isinstance(event, DecisionMade)]) > 1
    assert sum(event.global_batch for event in events if isinstance(event, Step)) == 96
    table = ThroughputTable(tmp_path / "table.jsonl")
    assert '"failure":"out of memory"' in table.path.read_text(), "and no other job tries it either"


def _no_memory(run: Path, table: Path) -> str:
    try:
        _train(run, table, "memory")
    except torch.OutOfMemoryError as error:
        return str(error)
    return "trained"


def _no_room_for_the_update(after: Configuration) -> None:
    """From now on weights cannot be updated in a configuration, on any rank."""
    original = megatron_step._set_options

    def set_options(*arguments: Any) -> None:
        original(*arguments)
        if megatron_step.parallel_state.get_data_parallel_world_size() == after.layout.dp:
            raise torch.OutOfMemoryError("no room")

    megatron_step._set_options = set_options


@pytest.mark.dist
def test_no_memory_where_weights_may_have_changed_is_remembered_and_not_resumed(tmp_path: Path) -> None:
    """The rank fails, and the engine restarts the job; it comes back in another layout, though it was saved in this."""
    table = tmp_path / "table.jsonl"
    assert run_ranks(2, _no_memory, tmp_path, table) == ["no room"] * 2
    assert '"failure":"out of memory"' in table.read_text()
    labels = run_ranks(2, _resumed, tmp_path / "run", table)
    assert labels in (["TP2·PP1·DP1"] * 2, ["TP1·PP2·DP1"] * 2), "not with every weight on every rank again"


def _resumed(run: Path, table: Path) -> str:
    """Layout that a job saved in a configuration comes back in."""
    backend = backend_of(tiny_job(2, {"dp": 2}, global_batch=4))
    Writing(run, backend, TrainerState(samples_consumed=8), keep=1, in_background=False).finish()
    known = Throughput(ThroughputTable(table).rows(backend.fingerprint()) if dist.get_rank() == 0 else [])
    resume.build_or_resume(tiny_job(2, {"tp": 2}, global_batch=4), newest_checkpoint(run), backend, known)
    return backend.configuration.layout.label


def _full_disk() -> None:
    """The second checkpoint finds a full disk, on rank 0, at a file that only rank 0 writes."""
    original, calls = sharded.dump_metadata, []

    def dump_metadata(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(*arguments)

    sharded.dump_metadata = dump_metadata


@pytest.mark.dist
def test_a_full_disk_costs_a_checkpoint_and_not_the_training(tmp_path: Path) -> None:
    events = run_ranks(2, _train, tmp_path, tmp_path / "table.jsonl", "disk")[0]
    failures = [event for event in events if isinstance(event, Failure)]
    assert len(failures) == 1
    assert 64 <= failures[0].samples_consumed < 96, "it is told when the checkpoint of 64 would have been complete"
    assert "No space left" in failures[0].message
    assert not failures[0].fatal
    assert [int(event.path[-12:]) for event in events if isinstance(event, Checkpoint)] == [32, 96, 96]
    assert sum(event.global_batch for event in events if isinstance(event, Step)) == 96


def test_lines_that_find_no_room_are_lost_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's output is on the disk of the run: what says that events are lost may be lost too."""
    full = io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        print("a line", file=full, flush=True)
    monkeypatch.setattr(sys, "stderr", worker.Output(full))
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    report_failure(JobError("the disk is full"), EventLog(tmp_path), 0)
    print("a line", file=sys.stderr, flush=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nobody may mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill_up(run: Path, when: str) -> tuple[list[Event], str]:
    """Train on a disk that is full at the second and third checkpoint, or at the last one."""
    job = tiny_job(1, global_batch=4, tokens=16 * 48, checkpoint_every_tokens=16 * 16, keep_checkpoints=1)
    backend = backend_of(job)
    begin_save, saves, events = backend.begin_save, [], list[Event]()

    def begin_save_and_fill(folder: Path, copy: bool) -> Any:
        saves.append(folder)
        filler = run.parent / "filler"
        full = len(saves) in (2, 3) if when == "meanwhile" else len(saves) == 4
        with open(filler, "wb") as file, contextlib.suppress(OSError):
            while full and shutil.disk_usage(run).free > 100_000:
                file.write(bytes(4096))
                file.flush()
        return begin_save(folder, copy)

    backend.begin_save = begin_save_and_fill  # type: ignore[method-assign]
    data = random_batches, random_batches
    trainer = Trainer(job, run, backend, *data, None, TrainerState(), events.append, lambda: False)
    try:
        return events, trainer.train()
    except JobError as error:
        return events, str(error)


@pytest.mark.dist
@pytest.mark.parametrize("when", ["meanwhile", "at the end"])
def test_a_disk_without_room_is_said_to_be_full(small_disk: Path, when: str) -> None:
    """Whatever torch's writer says of it. Only without the last checkpoint has the run not succeeded."""
    run = small_disk / "run"
    run.mkdir()
    events, end = run_ranks(1, _fill_up, run, when)[0]
    failures = [event.message for event in events if isinstance(event, Failure)]
    full = f"the disk of {run}/checkpoints is full"
    if when == "meanwhile":
        assert end == "finished"
        assert len(failures) == 2
        assert all(full in message and "training goes on" in message for message in failures), failures
        assert newest_checkpoint(run) == run / "checkpoints" / "samples-000000000048"
    else:
        assert failures == []
        assert end.startswith(f"the last checkpoint was not written: {full}"), end
        assert end.endswith("make room, then resume")
        assert newest_checkpoint(run) == run / "checkpoints" / "samples-000000000048", "of the same samples"


def _elsewhere(run: Path, layout: dict[str, Any], ranks: int, steps: int) -> tuple[list[float], str]:
    """Some steps of a job of `ranks` ranks, from its newest checkpoint, on the ranks that there are."""
    job = resized(tiny_job(ranks, layout, micro_batch=2), Cluster(accelerators_per_node=dist.get_world_size()))
    backend = MegatronBackend(job, own_device())
    newest = newest_checkpoint(run)
    state = resume.build_or_resume(job, newest, backend, Throughput())
    losses = []
    for _ in range(steps):
        losses.append(backend.train_step(random_batches, StepRequest(state.samples_consumed, RULES)).loss)
        state.samples_consumed += backend.configuration.global_batch
        state.optimizer_steps = backend.optimizer_steps
    Writing(run, backend, state, keep=2, in_background=False).finish()
    return losses, backend.configuration.label


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout",
    [
        {"pp": 2, "dp": 2, "zero": 1},
        pytest.param({"tp": 2, "dp": 2}, marks=pytest.mark.slow),
        pytest.param({"tp": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_job_goes_on_with_fewer_ranks_and_with_more(layout: dict[str, Any], tmp_path: Path) -> None:
    steady = run_ranks(4, _elsewhere, tmp_path / "steady", layout, 4, 9)[0][0]
    run, losses, labels = tmp_path / "moving", [], []
    for ranks in (4, 2, 1, 4):
        found, label = run_ranks(ranks, _elsewhere, run, layout, 4, 3 if ranks != 1 else 0)[0]
        losses += found
        labels.append(label)
    np.testing.assert_allclose(losses, steady, rtol=1e-4)
    assert len(set(labels)) >= 3


def _change_optimizer(run: Path, layouts: list[dict[str, Any]]) -> list[float]:
    """Steps under one layout, a checkpoint, and steps from it under a planner's other choice."""
    job = tiny_job(2, layouts[0], micro_batch=2)
    backend = backend_of(job)
    losses = [backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss for step in range(3)]
    Writing(run, backend, TrainerState(samples_consumed=24, optimizer_steps=3), keep=2, in_background=False).finish()
    other = configuration(8, 2, **layouts[1])
    resume.fits = lambda *arguments: False  # type: ignore[attr-defined]
    resume.fitting = lambda *arguments: other  # type: ignore[attr-defined]
    state = resume.build_or_resume(job, newest_checkpoint(run), backend, Throughput())
    assert backend.configuration == other
    first = state.samples_consumed
    return losses + [backend.train_step(random_batches, StepRequest(first + 8 * step, RULES)).loss for step in range(3)]


@pytest.mark.dist
@pytest.mark.parametrize("zero", [0, 1])
def test_the_distributed_optimizer_changes_between_checkpoint_and_resume(zero: int, tmp_path: Path) -> None:
    one, other = {"dp": 2, "zero": zero}, {"dp": 2, "zero": 1 - zero}
    stays = run_ranks(2, _change_optimizer, tmp_path / "stays", [one, one])[0]
    changes = run_ranks(2, _change_optimizer, tmp_path / "changes", [one, other])[0]
    np.testing.assert_allclose(changes, stays, rtol=1e-5)
