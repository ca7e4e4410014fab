"""The throughput table: an append-only file of measurements, one JSON object a line, shared by all jobs."""

import os
import warnings
from pathlib import Path

from pydantic import ValidationError

from profiles.measurement import Fingerprint, Measurement


class ThroughputTable:
    """A JSONL file of `Measurement`. Several jobs may append to it at once; nothing is ever rewritten."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        self.skipped = 0
        """Lines that the last `rows` could not read: torn by a crash, or written by another version."""

    def rows(self, fingerprint: Fingerprint | None = None) -> list[Measurement]:
        """The measurements of this model, software and hardware (without them: all), oldest line first; none where the
        file does not exist.

        Lines that are no measurement are skipped and counted in `skipped`, with one warning. Raises OSError where the
        file cannot be read.
        """
        self.skipped = 0
        found = []
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        for line in filter(None, lines):
            try:
                measurement = Measurement.model_validate_json(line)
            except ValidationError:
                self.skipped += 1
                continue
            if fingerprint is None or measurement.fingerprint == fingerprint:
                found.append(measurement)
        if self.skipped:
            warnings.warn(f"{self.path}: skipped {self.skipped} of {len(lines)} lines, not measurements", stacklevel=2)
        return found

    def add(self, measurement: Measurement) -> None:
        """Append one row durably, in one write; makes the folder. Raises OSError where it cannot."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = measurement.model_dump_json().encode() + b"\n"
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line  # a crash tore the last line: do not let it swallow this one
            if os.write(file, line) != len(line):
                raise OSError(f"{self.path}: the disk took only a part of a row")
            os.fsync(file)
        finally:
            os.close(file)
