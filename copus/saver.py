"""The checkpoints of a run: one at a time, in the background where that was asked for, and each with its event."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from copus.backends.base import Backend, TrainerState
from copus.checkpoints import CheckpointError, Writing
from copus.events import Checkpoint, Event
from copus.job import TrainingConfig


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
        self._waited = 0.0
        """How long training waited for its beginning."""
        self._begun = 0.0

    @property
    def is_writing(self) -> bool:
        """Whether this rank is at it."""
        return self._writing is not None and not self._writing.is_written

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
            self._report(
                Checkpoint(
                    **self._state.here,
                    path=str(folder.relative_to(self._run)),
                    seconds=self._waited + time.perf_counter() - started,
                    background_seconds=behind,
                    bytes=size,
                )
            )

    def write_last(self) -> None:
        """The checkpoint that a run ends with. The run depends on it: raises CheckpointError."""
        self._begin(False, needed=True)

    def _begin(self, in_background: bool, needed: bool) -> None:
        self.finish()
        started = time.perf_counter()
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
