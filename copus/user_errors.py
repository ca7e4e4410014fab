"""Errors that only the user can fix: which ones they are, and how a process that meets one ends."""

import errno
import sys

from copus.event_log import EventLog
from copus.events import Failure
from copus.job import JobError

EXIT_CODE = 2
"""Exit code of every process, command or worker, that ends with one. No engine starts such a worker again."""
FILE_ERRORS = {
    getattr(errno, name) for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EISDIR", "ENOTDIR", "ENOTEMPTY")
}
"""Errors of the file system that are no fault of copus: permissions, a full disk, a folder where a file belongs."""


def user_message(error: BaseException) -> str | None:
    """The line that tells the user what to fix; None for an error that is not the user's to fix."""
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, JobError):
        return str(error)
    if isinstance(error, RuntimeError) and str(error).startswith("Could not determine home directory"):  # pathlib's
        return "there is no home directory: set HOME"
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


def report_failure(error: Exception, log: EventLog, rank: int) -> bool:
    """Log the error that ends this process. True, with the message on stderr, if the user has to fix it."""
    message = user_message(error)
    is_users = message is not None
    message = message or one_line(error)
    log.write(Failure(step=0, samples_consumed=0, rank=rank, message=message, user_error=is_users))
    if is_users:
        print(message, file=sys.stderr)
    return is_users


def one_line(error: BaseException) -> str:
    """An exception on one line: `TypeName: message`."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
