"""The throughput table: an append-only file of measurements, one JSON object a line, shared by all jobs."""

import contextlib
import errno
import fcntl
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from profiles.measurement import Fingerprint, Measurement

_LOOKED_AT_BYTES = 1 << 16


class ThroughputTable:
    """A JSONL file of `Measurement`. Several jobs may append to it at once; nothing is ever rewritten.

    `profiles.query` filters and summarises such files, several at once.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        self.skipped = 0
        """Lines that the last `rows` could not read: torn by a crash, or written by another version."""

    def rows(self, fingerprint: Fingerprint | None = None) -> list[Measurement]:
        """The steps measured of this model, software and hardware (without them: all), oldest line first; none where
        the file does not exist. Shards measured alone are no steps: `shards` has them.

        Lines that are no measurement are skipped and counted in `skipped`, with one warning. Raises OSError if the
        file cannot be read.
        """
        return [row for row in self._read(fingerprint) if not row.shard]

    def shards(self, fingerprint: Fingerprint) -> list[Measurement]:
        """What one accelerator measured of single shards, for the same fingerprint; else as `rows`."""
        return [row for row in self._read(fingerprint) if row.shard]

    def everything(self, fingerprint: Fingerprint | None = None) -> list[Measurement]:
        """Steps and shards; else as `rows`."""
        return self._read(fingerprint)

    def check(self) -> None:
        """Raise OSError if no table can be read from the path, or surely none made there."""
        if self.path.exists():
            if not self.path.is_file():  # opening a pipe waits for a writer
                raise OSError(errno.EINVAL, "not a regular file", str(self.path))
            if not os.access(self.path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))
            if not self._looks_like_a_table():
                raise OSError(errno.EINVAL, "no throughput table: none of its lines is a measurement", str(self.path))
            return
        above = self._above()
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))

    def check_writable(self) -> None:
        """Raise OSError if nothing could be added either. Leaves nothing behind."""
        self.check()
        if self.path.exists():
            if not os.access(self.path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))
            return
        with tempfile.TemporaryFile(dir=self._above()):
            pass

    def _looks_like_a_table(self) -> bool:
        """Whether the file is empty, or has a line of a measurement, of whatever version, in its first part: rows are
        appended to it, and it may be a file of the user's with another purpose."""
        with open(self.path, "rb") as file:
            lines = list(filter(None, (line.strip() for line in file.read(_LOOKED_AT_BYTES).splitlines())))
        return not lines or any(line.startswith(b"{") and b'"fingerprint"' in line for line in lines)

    def _above(self) -> Path:
        """The nearest folder above, or what is in its place, that is there."""
        return next(parent for parent in self.path.absolute().parents if parent.exists())

    def _read(self, fingerprint: Fingerprint | None) -> list[Measurement]:
        self.skipped = 0
        measurements = []
        self.check()
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        first_flaw = ""
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                measurement = Measurement.model_validate_json(line)
            except ValidationError as error:
                self.skipped += 1
                first_flaw = first_flaw or f"line {number}: {_flaw(error)}"
                continue
            if fingerprint is None or measurement.fingerprint == fingerprint:
                measurements.append(measurement)
        if self.skipped:
            warnings.warn(
                f"{self.path}: skipped {self.skipped} of {len(lines)} lines, which are no measurements to this version "
                f"of copus and do no harm ({first_flaw})",
                stacklevel=3,
            )
        return measurements

    def add(self, measurement: Measurement) -> None:
        """Append one row durably, in one write; makes the folder. Raises OSError if it cannot."""
        self.extend([measurement])

    def extend(self, measurements: Iterable[Measurement]) -> None:
        """Append rows durably, all in one write; makes the folder. Raises OSError if it cannot."""
        text = b"".join(measurement.model_dump_json().encode() + b"\n" for measurement in measurements)
        if not text:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # NFS appends where the file ended when it looked: one at a time
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                text = b"\n" + text  # a crash tore the last line: do not let it swallow this one
            if os.write(file, text) != len(text):
                raise OSError(f"{self.path}: the disk took only a part of what was added")
            os.fsync(file)
        finally:
            os.close(file)


def _flaw(error: ValidationError) -> str:
    """What is wrong with a line, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return "not JSON"
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg'].removeprefix('Value error, ')}" if place else first["msg"]
