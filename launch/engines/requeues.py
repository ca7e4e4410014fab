"""A job that goes back into the queue: what says so, and how often it did, and whether that led anywhere
(RUN/requeues.json)."""

from pathlib import Path

from pydantic import ValidationError

from copus.durable import write_atomically
from profiles.record import Record

FILE = "requeues.json"
AGAIN, HOPELESS = 75, 69
"""Exit codes of a node, where a scheduler decides by them: the run has to go on (EX_TEMPFAIL of sysexits.h), or another
start is of no use (EX_UNAVAILABLE)."""
REQUEUE = "requeue\n"
"""What is in RUN/stop where a job goes back into the queue; the user's stop has nothing in it."""


class Requeues(Record):
    """What is counted, as it was when the newest attempt began."""

    job_id: str
    """Another job of the same run counts anew."""
    attempt: int
    """0 is the first."""
    checkpoint_samples: int
    """Samples of the newest checkpoint that the attempt began with; 0 for none."""
    fruitless: int
    """Requeues in a row, up to this attempt, that no new checkpoint came before."""


def count_attempt(run: Path, job_id: str, attempt: int, checkpoint_samples: int) -> Requeues:
    """Count an attempt that begins, and write that down.

    It is counted here, and not where the job is sent back: when a node dies Slurm does that, and asks nobody.
    """
    before = _read(run)
    fruitless = 0
    if before is not None and before.job_id == job_id and attempt >= before.attempt:
        fruitless = 0 if checkpoint_samples > before.checkpoint_samples else before.fruitless + attempt - before.attempt
    now = Requeues(job_id=job_id, attempt=attempt, checkpoint_samples=checkpoint_samples, fruitless=fruitless)
    write_atomically(run / FILE, now.model_dump_json(indent=2) + "\n")
    return now


def next_attempt(run: Path, job_id: str, *, evicted: bool) -> int:
    """Number of an attempt that begins, where the scheduler counts none. One that was `evicted` begins again under its
    number, and so is never counted."""
    before = _read(run)
    if before is None or before.job_id != job_id:
        return 0
    return before.attempt if evicted else before.attempt + 1


def _read(run: Path) -> Requeues | None:
    try:
        return Requeues.model_validate_json((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError):  # written by nobody else, and worth no failure
        return None
