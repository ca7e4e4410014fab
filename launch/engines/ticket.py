"""RUN/engine.json: the queued job that a run belongs to."""

from pathlib import Path

from pydantic import ValidationError

from copus.durable import write_atomically
from copus.job import JobError
from launch.run_directory import shown
from profiles.record import Record

FILE = "engine.json"


class Ticket(Record):
    """What a scheduler gave for a job."""

    engine: str
    """Its name, as in `launch.engine`."""
    job_id: str
    """How the scheduler calls the job."""
    submitted: float
    """Seconds since the epoch."""
    place: str | None = None
    """Where the id means something, for an engine with several such places: a namespace."""


def write_ticket(run: Path, ticket: Ticket) -> None:
    """Say that the run belongs to this job, and no longer to the one before."""
    write_atomically(run / FILE, ticket.model_dump_json(indent=2) + "\n")


def read_ticket(run: Path) -> Ticket | None:
    """The job that the run belongs to; None for one that was never queued. Raises JobError if that is unreadable."""
    try:
        text = (run / FILE).read_text(encoding="utf-8")
        return Ticket.model_validate_json(text)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise JobError(f"{shown(run / FILE)}: {' '.join(str(error).split())}") from None


def clear_ticket(run: Path) -> None:
    """Say that the run belongs to no queued job any more."""
    (run / FILE).unlink(missing_ok=True)
