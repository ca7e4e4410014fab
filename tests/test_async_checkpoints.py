"""Checkpoints that are written while training goes on."""

import contextlib
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.fault_files import largest_difference, state_of
from copus.backends.megatron.backend import MegatronBackend
from copus.checkpoints import sharded
from copus.checkpoints.store import CheckpointError, Writing, newest_checkpoint, read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.events import Checkpoint, Event, Failure, Reconfigure, Step
from copus.loop import Trainer
from copus.manifest import files_of
from tests.eager_planner import EagerPlanner, decide_often
from tests.megatron_jobs import configuration, random_batches, tiny_job
from tests.ranks import own_device, run_ranks
from tests.test_checkpoints import FilesBackend, FilesSave

SAMPLES = 72


def _writing(run: Path, samples: int) -> Writing:
    state = TrainerState(samples_consumed=samples)
    return Writing(run, FilesBackend(), state, keep=1, in_background=True)  # type: ignore[arg-type]


def test_it_counts_from_the_moment_that_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _writing(tmp_path, 100).finish()
    write, let_go = FilesSave.write, threading.Event()
    monkeypatch.setattr(FilesSave, "write", lambda self: let_go.wait(10) and write(self))
    writing = _writing(tmp_path, 200)
    assert writing.in_background
    assert not writing.is_written
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "samples-000000000100"
    let_go.set()
    folder, size = writing.finish()
    assert newest_checkpoint(tmp_path) == folder == tmp_path / "checkpoints" / "samples-000000000200"
    assert size == sum((folder / name).stat().st_size for name in files_of(folder))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "the one before has gone, and not earlier"


def test_training_waits_where_there_is_no_room_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_copy(self: FilesBackend, folder: Path, copy: bool) -> FilesSave:
        assert copy
        return FilesSave(folder, is_copy=False, full=False)

    monkeypatch.setattr(FilesBackend, "begin_save", without_copy)
    writing = _writing(tmp_path, 100)
    assert not writing.in_background
    assert newest_checkpoint(tmp_path) is None
    assert writing.finish()[0] == newest_checkpoint(tmp_path)


def test_what_goes_wrong_behind_the_scenes_is_told_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FilesSave) -> None:
        raise OSError(28, "No space left on device")

    _writing(tmp_path, 100).finish()
    monkeypatch.setattr(FilesSave, "write", fail)
    writing = _writing(tmp_path, 200)
    with pytest.raises(CheckpointError, match="No space left"):
        writing.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["samples-000000000100"]


class KilledError(Exception):
    """Stands for the death of a process."""


def _ruin(what: str, state: TrainerState) -> None:
    """From now on writing in the background takes two steps at least, or hangs in the second checkpoint, or finds a
    full disk there on rank 1."""
    write, calls = sharded.Save.write, []

    def ruined(self: sharded.Save) -> None:
        calls.append(1)
        until = min(state.samples_consumed + 8, SAMPLES)
        while what == "slow" and state.samples_consumed < until and threading.current_thread().daemon:
            time.sleep(0.001)
        if what == "hangs" and len(calls) == 2:
            time.sleep(600)
        if what == "full" and len(calls) == 2 and dist.get_rank() == 1:
            self.files = ["none/there"]
        write(self)

    sharded.Save.write = ruined  # type: ignore[method-assign]


def _train(run: Path, every: int, ruin: str, in_background: bool = True, moves: bool = False) -> list[Event]:
    """Train from the newest checkpoint to the end, or to the moment where the process is killed; events of rank 0."""
    settings = {"global_batch": 4, "micro_batch": 1, "tokens": 16 * SAMPLES, "checkpoint_every_tokens": 16 * every}
    job = tiny_job(2, {"tp": 2}, **settings, async_checkpoints=in_background, keep_checkpoints=9)
    job = job.model_copy(update={"planner": job.planner.model_copy(update={"every_samples": 28})})
    backend = MegatronBackend(job, own_device())
    backend.build(job.training.configuration)
    state, newest = TrainerState(), newest_checkpoint(run)
    if newest is not None:
        state, _ = read_state(newest)
        backend.load(newest, state.optimizer_steps)
    _ruin(ruin, state)
    decide_often()
    planner = EagerPlanner(job, configuration(4, 1, dp=2)) if dist.get_rank() == 0 else None
    if planner is not None and not moves:
        planner.throughput.refuse(configuration(4, 1, dp=2), "not today")
    events: list[Event] = []

    def stop() -> bool:
        if ruin == "hangs" and state.samples_consumed == 56:
            raise KilledError
        return False

    trainer = Trainer(job, run, backend, random_batches, random_batches, planner, state, events.append, stop)  # type: ignore[arg-type]
    with contextlib.suppress(KilledError):
        trainer.train()
    return events


def _losses(events: list[Event]) -> dict[int, float | None]:
    return {event.samples_consumed: event.loss for event in events if isinstance(event, Step)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """A run that waits for its checkpoints."""
    run = tmp_path_factory.mktemp("undisturbed")
    return run, run_ranks(2, _train, run, 24, "nothing", False)[0]


@pytest.mark.dist
def test_what_is_written_is_what_was_when_it_began(undisturbed: tuple[Path, list[Event]], tmp_path: Path) -> None:
    """Training goes on and moves to another layout before anything is written of the checkpoint at 24."""
    events = run_ranks(2, _train, tmp_path, 24, "slow", True, True)[0]
    (move,) = [event for event in events if isinstance(event, Reconfigure)]
    first = next(event for event in events if isinstance(event, Checkpoint))
    assert first.path.endswith("24")
    assert first.samples_consumed > move.samples_consumed == 28
    assert first.background_seconds > 0
    name = "checkpoints/samples-000000000024"
    assert largest_difference(state_of(tmp_path / name), state_of(undisturbed[0] / name)) == 0


@pytest.mark.dist
@pytest.mark.slow
def test_a_kill_while_one_is_written_costs_that_one(undisturbed: tuple[Path, list[Event]], tmp_path: Path) -> None:
    first = run_ranks(2, _train, tmp_path, 24, "hangs")[0]
    assert [event.path[-2:] for event in first if isinstance(event, Checkpoint)] == ["24"]
    assert max(_losses(first)) == 56, "it was being written for two steps"
    second = run_ranks(2, _train, tmp_path, 24, "nothing")[0]
    assert _losses(first) | _losses(second) == _losses(undisturbed[1]), "to the bit"
    assert min(_losses(second)) == 28
    name = "checkpoints/samples-000000000072"
    assert largest_difference(state_of(tmp_path / name), state_of(undisturbed[0] / name)) == 0


@pytest.mark.slow
@pytest.mark.dist
def test_one_that_is_due_waits_for_the_one_before(tmp_path: Path) -> None:
    events = run_ranks(2, _train, tmp_path, 12, "slow")[0]
    paths = [event.path for event in events if isinstance(event, Checkpoint)]
    assert [int(path[-3:]) for path in paths] == [12, 24, 36, 48, 60, 72, 72]
    assert all(newest_checkpoint(tmp_path) is not None for _ in paths)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6


@pytest.mark.slow
@pytest.mark.dist
def test_a_full_disk_in_the_background_is_a_warning(tmp_path: Path) -> None:
    events = run_ranks(2, _train, tmp_path, 24, "full")[0]
    (failure,) = [event for event in events if isinstance(event, Failure)]
    assert not failure.fatal
    assert "rank 1" in failure.message
    assert [event.path[-2:] for event in events if isinstance(event, Checkpoint)] == ["24", "72", "72"]
    assert len(_losses(events)) == SAMPLES // 4
