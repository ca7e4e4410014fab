"""Checkpoints on disk: what verifies, what is passed over, what is kept, and what a full disk leaves behind."""

import errno
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copus.checkpoints import files, store
from copus.checkpoints.store import CheckpointError, Writing, newest_checkpoint, read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import RankError
from copus.fencing import TOKEN
from copus.manifest import MANIFEST, damage, describe, files_of, read_manifest, write_manifest
from tests.launch_events import TENSOR


class FilesBackend:
    """Saves two files; where `full` is set the disk has no room for the second."""

    configuration = TENSOR
    full = False

    def begin_save(self, folder: Path, copy: bool) -> "FilesSave":
        return FilesSave(folder, copy, self.full)


class FilesSave:
    files: ClassVar = ["weights/0.bin"]

    def __init__(self, folder: Path, is_copy: bool, full: bool) -> None:
        self.is_copy = is_copy
        self._folder, self._full = folder, full

    def write(self) -> None:
        (self._folder / "weights").mkdir()
        (self._folder / "weights" / "0.bin").write_bytes(bytes(range(256)) * 8)

    def finish(self) -> None:
        if self._full:
            raise RankError(1, "OSError: No space left on device")
        (self._folder / "common").write_bytes(b"common")


def write(run: Path, samples: int, keep: int = 2, proven_samples: int = 0, **attributes: Any) -> Path:
    backend = FilesBackend()
    for name, value in attributes.items():
        setattr(backend, name, value)
    state = TrainerState(samples_consumed=samples, proven_samples=proven_samples)
    return Writing(run, backend, state, keep, in_background=False).finish()[0]  # type: ignore[arg-type]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest(run: Path) -> tuple[str | None, list[str]]:
    lines: list[str] = []
    found = newest_checkpoint(run, lines.append)
    return found and found.name, lines


def test_the_newest_one_that_was_written_is_found(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    for samples in (90, 1000, 200):
        write(tmp_path, samples, keep=5)
    assert newest(tmp_path) == ("samples-000000001000", [])
    assert read_state(tmp_path / "checkpoints" / "samples-000000000200")[0].samples_consumed == 200


def _truncate(checkpoint: Path) -> None:
    with open(checkpoint / "weights" / "0.bin", "r+b") as file:
        file.truncate(100)


def _flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "weights" / "0.bin").read_bytes())
    content[77] ^= 4
    (checkpoint / "weights" / "0.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_truncate, "100 bytes instead of 2048"),
        (_flip, "has changed"),
        (lambda checkpoint: (checkpoint / "common").unlink(), "No such file"),
        (lambda checkpoint: (checkpoint / MANIFEST).unlink(), "half-written"),
        (lambda checkpoint: (checkpoint / MANIFEST).write_text('{"version": 1, "fil'), "cannot be read"),
        (lambda checkpoint: (checkpoint / MANIFEST).write_text('{"version": 1, "files": {}}'), "no trainer.json"),
    ],
)
def test_a_spoilt_one_is_skipped_with_the_reason(spoil: Any, why: str, tmp_path: Path) -> None:
    write(tmp_path, 100)
    spoil(write(tmp_path, 200))
    found, lines = newest(tmp_path)
    assert found == "samples-000000000100"
    assert len(lines) == 1
    assert "samples-000000000200" in lines[0]
    assert why in lines[0]


def test_one_that_was_being_written_is_told_of_and_cleared_away(tmp_path: Path) -> None:
    write(tmp_path, 100)
    (tmp_path / "checkpoints" / ".writing").mkdir()
    (tmp_path / "checkpoints" / ".writing" / "rest").touch()
    found, lines = newest(tmp_path)
    assert found == "samples-000000000100"
    assert "half-written" in lines[0]
    write(tmp_path, 200)
    assert newest(tmp_path) == ("samples-000000000200", [])


def test_a_rank_that_was_frozen_while_it_wrote_reaches_no_checkpoint_of_a_later_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainerState(samples_consumed=100)
    backend: Any = FilesBackend()
    monkeypatch.setenv(TOKEN, "session-0")
    frozen = Writing(tmp_path, backend, state, 2, in_background=False)
    monkeypatch.setenv(TOKEN, "session-1")
    later = Writing(tmp_path, backend, state, 2, in_background=False)
    with pytest.raises(FileNotFoundError):  # it wakes up after it has made sure that the run is its own
        frozen._save.write()
    later.finish()
    assert names(tmp_path) == ["samples-000000000100"]
    assert newest(tmp_path) == ("samples-000000000100", [])


def test_a_rank_that_is_frozen_before_it_clears_away_removes_nothing_of_a_later_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainerState(samples_consumed=100)
    backend: Any = FilesBackend()
    later: list[Writing] = []

    def frozen(run: Path) -> None:
        """Its token is the newest one; when it wakes up it is not."""
        monkeypatch.setattr(store, "end_if_replaced", lambda run: None)
        monkeypatch.setenv(TOKEN, "session-1")
        later.append(Writing(run, backend, state, 2, in_background=False))

    monkeypatch.setenv(TOKEN, "session-0")
    monkeypatch.setattr(store, "end_if_replaced", frozen)
    Writing(tmp_path, backend, state, 2, in_background=False)
    later[0].finish()
    assert newest(tmp_path)[0] == "samples-000000000100"


def test_a_rank_that_is_frozen_while_it_verifies_sets_no_checkpoint_of_a_later_attempt_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _flip(write(tmp_path, 200))
    monkeypatch.setattr(files, "end_if_replaced", lambda run: write(run, 300))
    files.set_damaged_aside(tmp_path, None)
    assert names(tmp_path) == ["samples-000000000200.damaged", "samples-000000000300"]


@given(st.integers(0, 2048 + 6 - 1), st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    save = FilesBackend().begin_save(folder, copy=False)
    save.write()
    save.finish()
    write_manifest(folder, describe(folder, files_of(folder)))
    expected = read_manifest(folder)
    assert damage(folder, expected) is None
    path, place = (folder / "common", place) if place < 6 else (folder / "weights" / "0.bin", place - 6)
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    assert "has changed" in (damage(folder, expected) or "")


def test_a_full_disk_leaves_the_last_good_one_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 100, keep=1)
    with pytest.raises(CheckpointError, match=r"rank 1: .*No space left"):
        write(tmp_path, 200, keep=1, full=True)
    assert names(tmp_path) == ["samples-000000000100"]
    assert newest(tmp_path) == ("samples-000000000100", [])


def test_a_disk_that_fills_up_at_the_manifest_is_no_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 100, keep=1)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_manifest", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 200, keep=1)
    assert names(tmp_path) == ["samples-000000000100"]


def test_old_ones_go_and_the_newest_stay(tmp_path: Path) -> None:
    for samples in (100, 200, 300, 400):
        write(tmp_path, samples, keep=2)
    assert names(tmp_path) == ["samples-000000000300", "samples-000000000400"]


def test_the_one_just_written_stays_although_a_spoilt_one_has_more_samples(tmp_path: Path) -> None:
    write(tmp_path, 100, keep=1)
    _flip(write(tmp_path, 300, keep=1))
    write(tmp_path, 200, keep=1)
    assert newest(tmp_path)[0] == "samples-000000000200"


def test_one_of_the_same_name_is_replaced_and_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 100, keep=1)

    with monkeypatch.context() as patch:
        original = store.os.rename

        def rename(source: Path, target: Path) -> None:  # dies between the two renames
            if target.name == "samples-000000000100":
                raise KeyboardInterrupt
            original(source, target)

        patch.setattr(store.os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 100, keep=1)
    assert newest(tmp_path)[0] == "samples-000000000100.replaced"
    write(tmp_path, 100, keep=1)
    assert names(tmp_path) == ["samples-000000000100"]
