"""The checkpoints of a run: complete, verified and durable, or passed over; the newest few kept.

A checkpoint is a folder `checkpoints/samples-000000012345/` with the backend's files, `trainer.json`, and
`manifest.json`, the checksums of the others. It is written under another name, flushed, and renamed when everything is
on disk.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from copus.backends.base import Backend
from copus.checkpoints.files import FOLDER, REPLACED, checkpoint_names, samples_of, whats_wrong
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import RankError, all_gather, broadcast_from_rank0, run_on_all_ranks
from copus.durable import full_disk, sync_folder, write_text
from copus.fencing import end_if_replaced, own_name
from copus.manifest import Entry, describe, files_of, write_manifest
from profiles.configuration import Configuration

_WRITING = ".writing"


class CheckpointError(Exception):
    """A checkpoint could not be written; nothing of it is left, and the ones before it are as they were."""

    def __init__(self, message: str, *, disk_is_full: bool = False) -> None:
        super().__init__(message)
        self.disk_is_full = disk_is_full
        """Whether it is for want of room. Then every rank knows."""


def newest_checkpoint(run: Path, skipped: Callable[[str], None] = lambda line: None) -> Path | None:
    """The checkpoint with the most samples among those that verify, or None.

    Collective where there is a process group: the ranks share the reading. `skipped` gets one line for each that is
    passed over, on every rank.
    """
    for name in broadcast_from_rank0([folder.name for folder in _half_written(run)]):
        skipped(f"{FOLDER}/{name} is a half-written checkpoint: skipped")
    for name in broadcast_from_rank0(checkpoint_names(run)):
        checkpoint = run / FOLDER / name
        reason = find_damage(checkpoint)
        if reason is None:
            return checkpoint
        skipped(f"{FOLDER}/{name} does not verify: {reason}: skipped")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, the same on every rank, which share the reading; None if it verifies."""
    reasons = all_gather(whats_wrong(checkpoint, slice(_rank(), None, _ranks())))
    return next((reason for reason in reasons if reason), None)


def read_state(checkpoint: Path) -> tuple[TrainerState, Configuration]:
    """What the trainer has to know beside weights and optimizer state."""
    values = json.loads((checkpoint / "trainer.json").read_text())
    return TrainerState(**values["state"]), Configuration.model_validate(values["configuration"])


class Writing:
    """A checkpoint that is being written: everything that `--resume` needs. A run has one at a time.

    Each rank writes, flushes and checksums its share without the others. Then all complete it together: rank 0 adds the
    manifest and renames, and before that nothing on disk is a checkpoint.
    """

    def __init__(self, run: Path, backend: Backend, state: TrainerState, keep: int, in_background: bool) -> None:
        """Plan it, and begin to write a copy `in_background`, where there is room for one. Collective. `state` is the
        trainer's own: what is saved is a copy of now, what is kept of older ones depends on it in the end.

        Raises CheckpointError on every rank if the disk of any did not take it (full, gone, …), and leaves nothing.
        """
        self._run, self._keep, self._state = run, keep, state
        self._folder = run / FOLDER / own_name(_WRITING)
        self._samples = state.samples_consumed
        values = {"state": asdict(state), "configuration": backend.configuration.model_dump(mode="json")}
        self._trainer = json.dumps(values)
        self._entries: dict[str, Entry] = {}
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        try:
            _on_first(lambda: _make_empty(run, self._folder))
            self._save = backend.begin_save(self._folder, copy=in_background)
        except RankError as error:
            raise self._failed(error) from None
        if self._save.is_copy:
            self._thread = threading.Thread(target=self._write, daemon=True)  # a process that fails does not wait
            self._thread.start()

    @property
    def in_background(self) -> bool:
        """Whether training may go on."""
        return self._thread is not None

    @property
    def is_written(self) -> bool:
        """Whether `finish` has nothing to wait for on this rank."""
        return self._thread is not None and not self._thread.is_alive()

    def abandon(self) -> None:
        """Wait until nothing of it is being written any more. It never becomes a checkpoint."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> tuple[Path, int]:
        """Complete it, when every rank has written its share: the folder and its size in bytes. Collective.

        Raises CheckpointError as above. Older checkpoints beyond `keep` are removed last, so that there is always one
        that verifies.
        """
        if self._thread is None:
            self._write()
        else:
            self._thread.join()
        final = self._run / FOLDER / f"samples-{self._samples:012d}"
        try:
            shares = all_gather(run_on_all_ranks(self._described))
            self._save.finish()
            entries = {name: entry for share in shares for name, entry in share.items()}
            _on_first(lambda: self._commit(entries, final))
        except RankError as error:
            raise self._failed(error) from None
        return final, broadcast_from_rank0(sum(entry.bytes for entry in entries.values()))

    def _write(self) -> None:
        try:
            end_if_replaced(self._run)  # the disk is the newest attempt's
            self._save.write()
            self._entries = describe(self._folder, self._save.files)
        except Exception as error:  # the thread has nobody to tell: `finish` does
            self._error = error

    def _described(self) -> dict[str, Entry]:
        if self._error is not None:
            raise self._error
        return self._entries

    def _commit(self, entries: dict[str, Entry], final: Path) -> None:
        """What rank 0 does in the end. `entries` gets the small files that it alone writes."""
        write_text(self._folder / "trainer.json", self._trainer)
        entries |= describe(self._folder, [name for name in files_of(self._folder) if name not in entries])
        write_manifest(self._folder, entries)
        end_if_replaced(self._run)
        _put_in_place(self._folder, final)
        prune(self._run, self._samples, self._keep, self._state.proven_samples)

    def _failed(self, error: RankError) -> CheckpointError:
        """What is raised for an error, on every rank. Collective."""
        is_full, message = False, str(error)
        if _rank() == 0:
            is_full, message = _disk_is_full(self._folder, message)
            shutil.rmtree(self._folder, ignore_errors=True)
        is_full, message = broadcast_from_rank0((is_full, message))
        return CheckpointError(message, disk_is_full=is_full)


def _on_first(action: Callable[[], None]) -> None:
    """Do something with files on rank 0 while the others wait. Raises RankError."""
    run_on_all_ranks(action if _rank() == 0 else lambda: None, OSError)


def _make_empty(run: Path, folder: Path) -> None:
    """Make a folder, and remove those of others: a rank of theirs that was frozen, and wakes up, finds none to write
    into."""
    others = _half_written(run)
    end_if_replaced(run)
    for left in others:
        shutil.rmtree(left, ignore_errors=left != folder)
    folder.mkdir(parents=True)


def _half_written(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob(f"{_WRITING}*"))


def _put_in_place(writing: Path, final: Path) -> None:
    """Rename. One of the same name steps aside first, and stays a checkpoint until the new one has its place."""
    aside = final.with_name(final.name + REPLACED)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(writing, final)
    sync_folder(final.parent)


def _disk_is_full(folder: Path, message: str) -> tuple[bool, str]:
    """Whether a checkpoint could not be written for want of room, and the message, which says so then.

    torch's writer does not tell: its message is about the place in the file where it failed.
    """
    if "No space left" in message or "quota exceeded" in message:
        return True, f"the disk of {folder.parent} is full ({message})"
    full = full_disk(folder.parent)
    return full is not None, f"{full} ({message})" if full else message


def prune(run: Path, samples: int, keep: int, proven_samples: int) -> None:
    """Remove what is older than the newest `keep`, counted back from `samples`.

    The newest checkpoint with no more than `proven_samples` stays in any case: those after it may hold weights that are
    useless. One with more than `samples` did not verify when this run was resumed: it takes nobody's place.
    """
    behind = [name for name in checkpoint_names(run) if samples_of(name) <= samples]
    whole = [name for name in behind if not name.endswith(REPLACED)]
    end_if_replaced(run)
    kept = whole[:keep] + [name for name in whole if samples_of(name) <= proven_samples][:1]
    for name in behind:
        if name not in kept:
            shutil.rmtree(run / FOLDER / name, ignore_errors=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
