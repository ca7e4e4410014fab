"""What every engine offers."""

from pathlib import Path
from typing import Protocol

from copus.job import JobConfig


class Workers(Protocol):
    """Workers that were started: a handle.

    What stops them with a checkpoint is the file `RUN/stop`, whatever the engine; the handle has only what differs.
    """

    logs: Path
    """Folder, or file, that their output goes to."""

    def poll(self) -> int | None:
        """Exit code of the whole job, or None while it runs. 0 only if every worker ended with 0."""

    def terminate(self) -> None:
        """Send SIGTERM to every worker: they stop at the next step, with a checkpoint, if they still can."""

    def kill(self) -> None:
        """End every worker at once, without a checkpoint, and wait until they are gone."""

    def failed_rank(self) -> int | None:
        """Rank whose failure came first, where the engine can tell."""

    def error_log(self, rank: int) -> Path | None:
        """File with what a rank wrote to stderr in its last attempt, if there is one."""


class Engine(Protocol):
    """Starts the workers of a job."""

    def check(self, job: JobConfig) -> None:
        """Raise JobError where this engine cannot run the job. Leaves nothing behind."""

    def start(self, run: Path, job: JobConfig, lock: int, *, profile_only: bool = False) -> Workers:
        """Start `copus.worker RUN` on every accelerator of the job.

        `lock` is the descriptor of the run's lock: what keeps the workers alive keeps it open too, so that a run stays
        locked when its launcher dies first. `profile_only` makes the workers fill the throughput table and end.
        """
