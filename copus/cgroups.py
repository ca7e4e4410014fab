"""What control groups leave of the host's memory: a container, a Slurm step and a systemd unit have less of it than the
machine."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""A group's limit, what is used, and which of that is inactive page cache."""


def memory_left(root: Path = Path("/")) -> float:
    """Bytes that this process's groups, and those above them, still allow: limit − used, where page cache that can be
    dropped is not used. Infinite without a limit. Versions 1 and 2; `root` is where /proc and /sys are."""
    return min((_left(group, *names) for group, names in _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folder of each group, and what its figures are called."""
    top = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                mount, names = top, _VERSION_2
            elif "memory" in controllers.split(","):
                mount, names = top / "memory", _VERSION_1
            else:
                continue
            # a container without a namespace of its own reads a path that it cannot see: its own group is at the mount
            own = mount / path.lstrip("/")
            yield from ((folder, names) for folder in (own, *own.parents) if folder.is_relative_to(mount))


def _left(group: Path, limit: str, used: str, cache: str) -> float:
    with contextlib.suppress(OSError, ValueError):  # no such group or limit; "max"
        allowed = int((group / limit).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, allowed - int((group / used).read_text()) + int(stat.get(cache, 0)))
    return math.inf
