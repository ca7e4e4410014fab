"""Decides which works are kept for validation: whole works, by name."""

import difflib
import fnmatch
import hashlib
from collections.abc import Mapping

from copus.job import JobError

DEFAULT_SHARE = 0.05
"""Share of the bytes that is held out when the job names no works."""


def choose_held_out(work_bytes: Mapping[str, int], names: list[str]) -> set[str]:
    """The names of the works to hold out.

    `work_bytes`: every work with its size. `names`: the exact name of a work, or else a shell pattern, so that a work
    called `draft [2020]` or `star*` can be named, and no other is held out with it. If there are none, works are taken
    in the order of a hash of their names until 5 % of the bytes are held out, passing over those that would make it
    more than twice as much. Raises JobError for a name that matches nothing, and if one of the sides would be empty.
    """
    if not names:
        return _default(work_bytes)
    held_out: set[str] = set()
    for name in names:
        matches = [name] if name in work_bytes else fnmatch.filter(work_bytes, name)
        if not matches:
            raise JobError(
                f"data.held_out: {name!r} matches none of the {len(work_bytes)} works{_hint(name, work_bytes)}"
            )
        held_out.update(matches)
    if len(held_out) == len(work_bytes):
        raise JobError(f"data.held_out: {names} takes all {len(work_bytes)} works, which leaves none to train on")
    return held_out


def _default(work_bytes: Mapping[str, int]) -> set[str]:
    if len(work_bytes) == 1:
        raise JobError(
            f"data.held_out: the source is one work ({next(iter(work_bytes))}), which cannot be on both sides: "
            "add a file to data.source and name it here"
        )
    total = sum(work_bytes.values())
    held_out: set[str] = set()
    size = 0
    for work in sorted(work_bytes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if size >= DEFAULT_SHARE * total:
            break
        if size + work_bytes[work] <= 2 * DEFAULT_SHARE * total:
            held_out.add(work)
            size += work_bytes[work]
    return held_out or {min(work_bytes, key=lambda name: (work_bytes[name], name))}


def _hint(pattern: str, works: Mapping[str, int]) -> str:
    close = difflib.get_close_matches(pattern, works, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f": {', '.join(sorted(works)[:5])}{' …' if len(works) > 5 else ''}"
