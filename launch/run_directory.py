"""The run directory: making one, finding one, locking one, and asking its workers to stop."""

import contextlib
import difflib
import errno
import fcntl
import itertools
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from copus.durable import write_atomically
from copus.job import JobConfig, JobError, dump_job
from launch.lease import HeldError, Lease, holder_of
from launch.run_names import run_names, runs_folder, runs_in
from profiles.accelerator import is_file_of_user


def portable(job: JobConfig) -> JobConfig:
    """The job with absolute paths, so that the run can be resumed from any folder."""

    def absolute(path: Path) -> Path:
        return path.expanduser().absolute()

    source = job.data.source
    data = job.data.model_copy(
        update={
            "source": [absolute(path) for path in source] if isinstance(source, list) else source,
            "held_out_source": [absolute(path) for path in job.data.held_out_source],
            "tokenizer": job.data.tokenizer and absolute(job.data.tokenizer),
            "chat_template": job.data.chat_template and absolute(job.data.chat_template),
            "cache": absolute(job.data.cache),
        }
    )
    profile = job.profile.model_copy(update={"table": absolute(job.profile.table)})
    runs = job.launch.runs if "runs" in job.launch.model_fields_set else runs_folder()
    launch = job.launch.model_copy(update={"runs": absolute(runs)})
    cluster = job.cluster
    if is_file_of_user(cluster.accelerator):
        cluster = cluster.model_copy(update={"accelerator": str(absolute(Path(cluster.accelerator)))})
    training = job.training
    if training.init_from is not None:
        training = training.model_copy(update={"init_from": absolute(_place_of_weights(training.init_from))})
    sections = {"data": data, "training": training, "profile": profile, "launch": launch, "cluster": cluster}
    return job.model_copy(update=sections)


def _place_of_weights(path: Path) -> Path:
    """A folder, or the run of that name."""
    run = runs_folder() / path
    return run if not path.expanduser().exists() and (run / "job.yaml").is_file() else path


def create_run(
    job: JobConfig, suffix: str = "", *, numbered: bool = True, mark: Callable[[Path], None] | None = None
) -> Path:
    """Make `launch.runs/NAME`, or NAME-2, NAME-3 … where that is taken, with the resolved job in it. Absolute path.

    It is there with all that `mark` writes into it, or not at all. Raises JobError if it cannot be made, or if
    the name is taken and may not be `numbered`.
    """
    wanted = next(_names(job, suffix))
    made = wanted.with_name(f".{wanted.name}.{secrets.token_hex(4)}")
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        made.mkdir()
        try:
            write_job(made, job)
            if mark is not None:
                mark(made)
            return _put_in_place(made, _names(job, suffix) if numbered else iter([wanted]))
        except BaseException:
            discard_run(made)
            raise
    except OSError as error:
        raise JobError(f"launch.runs({job.launch.runs}): {error.strerror}: {error.filename}") from None


def _put_in_place(made: Path, names: Iterator[Path]) -> Path:
    """Give a run the first name that is free. Raises JobError if none is."""
    run = made
    for run in names:
        try:
            if not run.exists():
                return made.rename(run)
        except OSError as error:  # somebody was faster
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
    raise JobError(f"{shown(run)} is there already: another command has made it")


def next_run(job: JobConfig) -> Path:
    """The folder that `create_run` would make now. Makes nothing."""
    return next(run for run in _names(job, "") if not run.exists())


def _names(job: JobConfig, suffix: str) -> Iterator[Path]:
    runs = job.launch.runs.expanduser().absolute()
    base = job.name + suffix
    yield runs / base
    yield from (runs / f"{base}-{number}" for number in itertools.count(2))


def write_job(run: Path, job: JobConfig) -> None:
    """Write the resolved job into the run directory."""
    write_atomically(run / "job.yaml", dump_job(job))


def discard_run(run: Path) -> None:
    """Remove a run directory in which nothing has run yet, and the folder of runs where it was the only one."""
    shutil.rmtree(run)
    with contextlib.suppress(OSError):
        run.parent.rmdir()


def newest_run() -> Path:
    """The run in `runs_folder` that wrote an event last, or was made last. Raises JobError if there is none."""
    folder = runs_folder()
    runs = list(runs_in(folder))
    if not runs:
        raise JobError(f"no run in {folder}: name one, or go to the folder that has runs/, or set COPUS_RUNS")
    return max(runs, key=_last_written).absolute()


def _last_written(run: Path) -> float:
    return max(path.stat().st_mtime for path in (run / "job.yaml", run / "events.jsonl") if path.exists())


def find_run(text: str | None) -> Path:
    """A run directory from what a person typed: a path, or a name below `runs_folder`; None for the newest run there.
    Raises JobError if there is none."""
    if text is None:
        run = newest_run()
        print(f"copus: {shown(run)}, the newest run", file=sys.stderr)
        return find_run(str(run))
    try:
        for path in (Path(text).expanduser(), runs_folder() / text):
            if text and (path / "job.yaml").is_file():
                _check_events(path)
                return path.absolute()
    except (OSError, RuntimeError) as error:  # a name that is too long; `~` of a user that there is not
        raise JobError(f"no run {text[:80]}: {getattr(error, 'strerror', error)}") from None
    near = difflib.get_close_matches(text, run_names(), n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise JobError(f"no run {text}: neither {text} nor {runs_folder() / text} is a folder with a job.yaml{hint}")


def _check_events(run: Path) -> None:
    """Raise JobError if the event log is there and cannot be read. A run that has not started has none."""
    events = run / "events.jsonl"
    if events.exists() and not events.is_file():  # opening a pipe waits for a writer
        raise JobError(f"{shown(events.absolute())}: not a regular file")
    if events.exists() and not os.access(events, os.R_OK):
        raise JobError(f"{shown(events.absolute())}: {os.strerror(errno.EACCES)}")


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def typed(path: Path) -> str:
    """The same as a word of a command that can be pasted into a shell."""
    return shlex.quote(shown(path))


@contextmanager
def lock_run(run: Path, holder: str | None = None, wait_seconds: float = 0.5) -> Iterator[int]:
    """Hold the run: nobody else can start workers in it. Gives the lock's descriptor.

    Raises JobError if it is held by others for longer than `wait_seconds` (somebody who only looks, `lock_holder`,
    has it for a moment). They are told who has it: `holder`, else this process. The lock lasts as long as any process
    has the descriptor open, so a launcher that dies leaves it with the workers' agent. On a file system without `flock`
    it is a lease (`launch.lease`).
    """
    holder = holder or f"process {os.getpid()}"
    descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + wait_seconds
        while (taken := _try_lock(descriptor, fcntl.LOCK_EX)) is False:
            if time.monotonic() > end:
                raise _held(run, _written(descriptor))
            time.sleep(0.05)
        if taken:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{holder}\n".encode(), 0)
            yield descriptor
            return
    finally:
        os.close(descriptor)
    try:
        lease = Lease(run / "lock", holder, wait_seconds)
    except HeldError as error:
        raise _held(run, str(error)) from None
    try:
        yield lease.descriptor
    finally:
        lease.close()


def lock_holder(run: Path) -> str | None:
    """Who holds the run, in words; None if nobody does."""
    try:
        descriptor = os.open(run / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        taken = _try_lock(descriptor, fcntl.LOCK_SH)
        if taken is None:
            return holder_of(run / "lock")
        return None if taken else _written(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool | None:
    """Whether it was taken; None if the file system has no locks (Lustre without -o flock, some network ones)."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            return None
        raise JobError(f"launch.runs: the run directory cannot be locked: {error.strerror}") from None
    return True


def _held(run: Path, holder: str) -> JobError:
    return JobError(f"{shown(run)}: its workers are still running (launched by {holder})")


def _written(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "somebody"


def request_stop(run: Path) -> None:
    """Ask the workers to stop at the next step, with a checkpoint; for good, also where they were to go on later."""
    (run / "stop").write_text("")


def request_pause(run: Path, mark: str) -> None:
    """The same for a run that goes on later, as `mark` in the file says. A request to stop for good stays as it is.

    Raises OSError if nothing can be written: nothing is asked then. An empty file would ask to stop for good.
    """
    descriptor, temporary = tempfile.mkstemp(dir=run, prefix=".stop.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(mark)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, run / "stop")  # whole from its first moment, and never over another one
    finally:
        os.unlink(temporary)


def stop_requested(run: Path) -> bool:
    """Whether somebody asked for that since the launcher took the run."""
    return (run / "stop").exists()


def stopped_for_good(run: Path) -> bool:
    """Whether that was `request_stop`, and no pause."""
    try:
        return not (run / "stop").read_text()
    except FileNotFoundError:
        return False


def clear_stop(run: Path) -> None:
    """Take the request back, once: where a launcher has just taken the run. What comes later is meant for it."""
    (run / "stop").unlink(missing_ok=True)
