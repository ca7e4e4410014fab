"""Decides which works are kept for validation: whole works, by name."""

import difflib
import fnmatch
import hashlib
from collections.abc import Mapping

from copus.job import JobError

DEFAULT_SHARE = 0.05
"""Share of the bytes that is held out when the job names no works."""


def choose_held_out(work_bytes: Mapping[str, int], patterns: list[str]) -> set[str]:
    """The names of the works to hold out.

    `work_bytes`: every work with its size. `patterns`: names or shell patterns; where there are none, works are taken
    in the order of a hash of their names until 5 % of the bytes are held out, passing over those that would make it
    more than twice as much. Raises JobError for a pattern that matches nothing, and where one of the two sides would
    be empty.
    """
    if not patterns:
        return _default(work_bytes)
    held_out: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(work_bytes, pattern)
        if not matches:
            raise JobError(
                f"data.held_out: {pattern!r} matches none of the {len(work_bytes)} works{_hint(pattern, work_bytes)}"
            )
        held_out.update(matches)
    if len(held_out) == len(work_bytes):
        raise JobError(f"data.held_out: {patterns} takes all {len(work_bytes)} works, which leaves none to train on")
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
