"""RUN/resume.json: what the user asked for with `--resume` that is not a field of the job file."""

from pathlib import Path

from pydantic import ValidationError

from copus.durable import replace_text
from copus.job import JobError
from profiles.configuration import Configuration
from profiles.record import Record

_FILE = "resume.json"


class ResumeRequest(Record):
    """What the workers of a resumed run do differently. It counts only until they have written a checkpoint."""

    configuration: Configuration | None = None
    """Configuration to go on in, instead of the checkpoint's."""
    until_samples: int = 0
    """Samples of the newest checkpoint when the user asked: later ones are followed as they are."""
    may_begin_again: bool = False
    """Whether the run may begin at its first step if no checkpoint verifies."""


def write_resume_request(run: Path, request: ResumeRequest) -> None:
    """Replace the request of an earlier resume. One that asks for nothing leaves no file."""
    if request == ResumeRequest(until_samples=request.until_samples):
        (run / _FILE).unlink(missing_ok=True)
    else:
        replace_text(run / _FILE, request.model_dump_json(indent=2) + "\n")


def nothing_to_resume(run: Path, flaws: list[str]) -> JobError:
    """The error for a run that had checkpoints, of which none verifies; `flaws` says of each why."""
    why = "; ".join(flaw.removesuffix(": skipped") for flaw in flaws) or "they are gone"
    return JobError(
        f"{run}: none of its checkpoints verifies ({why}). To train again from the first step: `copus submit --resume` "
        "with --allow-from-scratch"
    )


def read_resume_request(run: Path) -> ResumeRequest:
    """The request of the last resume; one that asks for nothing if there was none, or it cannot be read."""
    try:
        return ResumeRequest.model_validate_json((run / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return ResumeRequest()
