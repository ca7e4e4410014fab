"""What a tracker is: another place where the figures of a run are shown. docs/tracking.md walks through writing one."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from copus.events import Event

if TYPE_CHECKING:
    from copus.job import JobConfig


class Tracker(Protocol):
    """Takes the figures of a run, on rank 0, in a thread of its own: it may wait, but training never waits for it.

    What an entry point of the group `copus.trackers` names makes one from its options in the job file, and raises
    ValueError where these are wrong. That is also called where the job file is only checked: it opens nothing, and
    imports nothing that is slow.

    Whatever it raises switches it off for the rest of the run, with one warning, and nothing else happens.
    """

    def start(self, run: Path, job: "JobConfig") -> None:
        """Open a place for the run in this directory. After a restart, or `--resume`, that is the place of before.

        Called before anything else, when there is something to show. What is sent as configuration is the job file.
        """

    def write(self, event: Event, tokens: int, figures: dict[str, float]) -> None:
        """Take an event, the tokens trained on by then (the x-axis), and what it says as named, finite numbers.

        `copus.tracking.figures.FIGURES` has the names. Only called where there are figures.
        """

    def close(self) -> None:
        """Send what is left. Called at the end, also after an error, and also where `start` failed."""
