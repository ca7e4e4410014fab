"""The checkpoints of a run: one at a time, in the background where that was asked for, and each with its event."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from copus.backends.base import Backend
from copus.checkpoints.files import FOLDER, checkpoint_names, samples_of, set_aside
from copus.checkpoints.store import CheckpointError, Writing, prune
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import broadcast_from_rank0
from copus.events import Checkpoint, Event
from copus.fencing import end_if_replaced
from copus.job import JobError, TrainingConfig


class Saver:
    """The checkpoints of a run, on one of its ranks. All ranks call the same, at the same steps."""

    def __init__(
        self,
        training: TrainingConfig,
        run: Path,
        backend: Backend,
        state: TrainerState,
        report: Callable[[Event], None],
        survived: Callable[[str], None],
    ) -> None:
        """`state` is the trainer's own, up to date whenever something is called here. `survived` is told why there is
        no checkpoint, where training goes on without it."""
        self._training = training
        self._run = run
        self._backend = backend
        self._state = state
        self._report = report
        self._survived = survived
        self._writing: Writing | None = None
        self._unproven_samples: int | None = None
        """Samples of the newest checkpoint, while its weights have not turned out to be good."""
        self._waited = 0.0
        """How long training waited for its beginning."""
        self._begun = time.perf_counter()
        """When the newest checkpoint was begun, or the run."""

    @property
    def is_writing(self) -> bool:
        """Whether this rank is at it."""
        return self._writing is not None and not self._writing.is_written

    @property
    def is_overdue(self) -> bool:
        """Whether none was begun for as long as the job file allows, by this rank's clock."""
        minutes = self._training.checkpoint_every_minutes
        return minutes is not None and time.perf_counter() - self._begun > 60 * minutes

    def begin(self) -> None:
        """Begin a checkpoint of now. One that is still being written is waited for."""
        self._begin(self._training.async_checkpoints, needed=False)

    def finish(self, needed: bool = False) -> None:
        """Complete the one that was begun, if any; waits for it."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        started = time.perf_counter()
        behind = started - self._begun if writing.in_background else 0.0
        with self._unless(needed):
            folder, size = writing.finish()
            self._unproven_samples = samples_of(folder.name)
            self._report(
                Checkpoint(
                    **self._state.here,
                    path=str(folder.relative_to(self._run)),
                    seconds=self._waited + time.perf_counter() - started,
                    background_seconds=behind,
                    bytes=size,
                )
            )

    def abandon(self) -> None:
        """Give up the one that was begun, if any: the other ranks are gone. Waits until this rank's thread is done."""
        if self._writing is not None:
            self._writing.abandon()
            self._writing = None

    def write_last(self) -> None:
        """Write the checkpoint that a run ends with. The run depends on it: raises JobError if the disk is full, and
        CheckpointError if it cannot be written for another reason."""
        try:
            self._begin(False, needed=True)
        except CheckpointError as error:
            if not error.disk_is_full:
                raise
            # Another attempt would train again for nothing.
            raise JobError(f"the last checkpoint was not written: {error}; make room, then resume") from None

    def prune(self) -> None:
        """Remove the older checkpoints that had to stay until a finite step followed the newest one."""
        if self._unproven_samples is not None and self._unproven_samples <= self._state.proven_samples:
            if dist.get_rank() == 0:
                prune(self._run, self._unproven_samples, self._training.keep_checkpoints, self._state.proven_samples)
            self._unproven_samples = None

    def set_diverged_aside(self) -> str | None:
        """Rename the checkpoints that may hold weights that are not finite, so that no resume begins with them. The
        newest one from before, relative to the run; None if there is none. Collective."""
        self.finish()
        if dist.get_rank() == 0:
            names = checkpoint_names(self._run)
            end_if_replaced(self._run)
            for name in names:
                if samples_of(name) > self._state.proven_samples:
                    set_aside(self._run, name, "diverged")
        newest = next(iter(checkpoint_names(self._run)), None)
        return broadcast_from_rank0(newest and f"{FOLDER}/{newest}")

    def _begin(self, in_background: bool, needed: bool) -> None:
        self.finish()
        started = self._begun = time.perf_counter()
        with self._unless(needed):
            keep = self._training.keep_checkpoints
            self._writing = Writing(self._run, self._backend, self._state, keep, in_background)
            self._begun = time.perf_counter()
            self._waited = self._begun - started
            if not self._writing.in_background:
                self.finish(needed)

    @contextlib.contextmanager
    def _unless(self, needed: bool) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if needed:
                raise
            self._survived(f"no checkpoint was written, training goes on: {error}")
