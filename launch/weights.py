"""The weights that a job begins with (`training.init_from`), before its workers start."""

import sys
from collections.abc import Callable
from pathlib import Path

from copus.job import JobConfig, JobError
from copus.weights.pretrained import keep_small_files
from copus.weights.source import Source, check_source, check_tokenizer_fits, digest_of, find_source, tokenizer_of


def check_weights(job: JobConfig, notice: Callable[[str], None]) -> tuple[JobConfig, Source | None]:
    """The job with the place and the digest of its weights, and what they are; None if it begins with random ones.

    Raises JobError, in one line, if they are not those of the job's model and tokenizer. Writes nothing.
    """
    path = job.training.init_from
    if path is None:
        if job.training.init_digest is not None:
            raise JobError(f"training.init_digest({job.training.init_digest}) needs training.init_from")
        if job.training.init_optimizer:
            raise JobError("training.init_optimizer(true) needs training.init_from")
        return job, None
    source = find_source(path)
    check_source(job, source, notice)
    digest = digest_of(source)
    if job.training.init_digest not in (None, digest):
        raise JobError(
            f"training.init_digest is {job.training.init_digest}, and the weights in {source.folder} have {digest}"
        )
    training = job.training.model_copy(update={"init_from": source.folder, "init_digest": digest})
    return job.model_copy(update={"training": training}), source


def keep_weights(run: Path, job: JobConfig, source: Source | None) -> int:
    """Compare the tokenizer of the prepared data with that of the weights, and copy what comes with these into the run.
    Returns an exit code; if it is not 0, the reason has been printed."""
    if source is None:
        return 0
    try:
        theirs = tokenizer_of(source)
        if theirs is not None:
            check_tokenizer_fits(theirs, job)
        keep_small_files(run, source)
    except JobError as error:
        print(f"copus: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"copus: {error.filename or run}: {error.strerror}", file=sys.stderr)
        return 2
    return 0
