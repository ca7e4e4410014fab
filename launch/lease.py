"""A lock for file systems without `flock`: a lease that its holder renews.

`lock.1`, `lock.2`, … beside the lock file are made exclusively (O_EXCL), and the one of the highest number counts. It
is held until its time is set to zero, or is not renewed for `LEASE_SECONDS`; then whoever makes the next number has the
lock. The highest file is never removed, so no two processes can both believe that they replaced it. No clocks of two
machines are compared: whether a lease is renewed is watched.

The time is renewed by a process of its own, `python -m launch.lease FILE`, until all processes that have the other end
of its pipe are gone: as with `flock`, the lock lasts as long as any process has the descriptor open.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch.process import module_environment, python_module

LEASE_SECONDS = 60.0
"""A lease that is not renewed for so long has ended: its machine is lost, or was cut off. Workers of an attempt that is
replaced notice that themselves (`copus.fencing`)."""
RENEW_SECONDS = 2.0
LOOK_SECONDS = 0.1
"""Time between two looks at a lease of somebody else."""
RELEASE_SECONDS = 0.5
"""How long a holder waits for its keeper to end, which it does at once unless others have the descriptor too."""


class HeldError(Exception):
    """Somebody else has the lock: `str` of it says who."""


@dataclass(frozen=True)
class _LeaseFile:
    number: int
    renewed_ns: int
    machine: str
    holder: str
    keeper: int | None

    @property
    def is_free(self) -> bool:
        """Whether it was given up, or its keeper was on this machine and is gone."""
        return self.renewed_ns == 0 or (
            self.keeper is not None and self.machine == _machine() and not Path(f"/proc/{self.keeper}").exists()
        )


class Lease:
    """The lock, held. `descriptor` may be handed to other processes, which then hold it too."""

    def __init__(self, lock: Path, holder: str, wait_seconds: float) -> None:
        """Take the lock. Raises HeldError if it is held after `wait_seconds`, and if that is not known yet, when it is
        known: the lease is renewed meanwhile, or has ended and is taken over."""
        file = _claim(lock, holder, wait_seconds)
        read_end, self.descriptor = os.pipe()
        try:
            self._keeper = subprocess.Popen(
                python_module("launch.lease", str(file)),
                env=os.environ | module_environment(),
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for others
            )
        except BaseException:
            os.close(self.descriptor)
            _release(file)
            raise
        finally:
            os.close(read_end)
        with open(file, "a", encoding="utf-8") as written:
            written.write(f"{self._keeper.pid}\n")
        for number in _numbers(lock):
            if number < _number(file):
                _file(lock, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it: it is free unless other processes have the descriptor."""
        os.close(self.descriptor)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(RELEASE_SECONDS)


def holder_of(lock: Path) -> str | None:
    """Who holds the lease, in words, at one look; None if nobody does, or if it has ended by this machine's clock."""
    newest = _newest(lock)
    if newest is None or newest.is_free or abs(time.time() - newest.renewed_ns / 1e9) > LEASE_SECONDS:
        return None
    return newest.holder


def _claim(lock: Path, holder: str, wait_seconds: float) -> Path:
    """Make the file of the next number as soon as the newest one is free, or is not renewed any more."""
    begin = since = time.monotonic()
    last: tuple[int, int] | None = None
    is_renewed = False
    while True:
        newest, now = _newest(lock), time.monotonic()
        place = (newest.number, newest.renewed_ns) if newest else None
        if place != last:
            is_renewed, last, since = last is not None, place, now
        if newest is None or newest.is_free or now - since > LEASE_SECONDS:
            number = newest.number + 1 if newest else 1
            with contextlib.suppress(FileExistsError):
                _make(_file(lock, number), holder)
                if max(_numbers(lock)) == number:
                    return _file(lock, number)
                _file(lock, number).unlink(missing_ok=True)  # others were two steps ahead
        elif is_renewed and now - begin > wait_seconds:
            raise HeldError(newest.holder)
        time.sleep(LOOK_SECONDS)


def _make(file: Path, holder: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with open(descriptor, "w", encoding="utf-8") as written:
        written.write(json.dumps({"machine": _machine(), "holder": holder}) + "\n")


def _newest(lock: Path) -> _LeaseFile | None:
    number = max(_numbers(lock), default=None)
    if number is None:
        return None
    try:
        with open(_file(lock, number), encoding="utf-8") as file:  # opening asks the server: a cached time may be old
            renewed_ns = os.fstat(file.fileno()).st_mtime_ns
            first, _, last = file.read().partition("\n")
    except FileNotFoundError:  # replaced since
        return _newest(lock)
    try:
        says = json.loads(first)
        return _LeaseFile(number, renewed_ns, says["machine"], says["holder"], int(last) if last.strip() else None)
    except (ValueError, KeyError, TypeError):  # it is being written
        return _LeaseFile(number, renewed_ns, "", "somebody", None)


def _numbers(lock: Path) -> list[int]:
    endings = (name.removeprefix(f"{lock.name}.") for name in os.listdir(lock.parent))
    return [int(ending) for ending in endings if ending.isdecimal()]


def _file(lock: Path, number: int) -> Path:
    return lock.with_name(f"{lock.name}.{number}")


def _number(file: Path) -> int:
    return int(file.suffix[1:])


def _machine() -> str:
    """Where process ids mean the same: this boot of this kernel, and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"process {os.getpid()}"  # no other process is known to be here


def _release(file: Path, folder: int | None = None) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(file, (0, 0), dir_fd=folder)


def _keep(file: Path) -> None:
    """Renew the lease until the pipe on stdin has no other end any more, or somebody else took it over."""
    folder = os.open(file.parent, os.O_RDONLY)  # runs are renamed while they are made
    name = Path(file.name)
    while not select.select([sys.stdin], [], [], RENEW_SECONDS)[0]:
        try:
            os.utime(name, dir_fd=folder)
        except FileNotFoundError:
            return
        except OSError:
            continue  # a server that is away for a moment
    _release(name, folder)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
