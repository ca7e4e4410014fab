"""Decides which works are kept for validation: whole works, by name, in one pass over a source of any size."""

import difflib
import fnmatch
import hashlib
import re
from collections.abc import Mapping

from copus.job import JobError
from profiles.record import Record

DEFAULT_SHARE = 0.05
"""Share of the bytes that is held out when the job names no works."""
DEFAULT_BYTES = 16 << 20
"""And the most, unless the job says which share: some four million tokens are more than evaluations read."""
MOST_TRACKED = 100_000
"""Works whose sizes are kept at a time: those with the lowest hashes, which are held out first."""


class HeldOut(Record):
    """Tells for the name of any work whether it is held out."""

    works: frozenset[str] = frozenset()
    """Names of works."""
    patterns: tuple[str, ...] = ()
    """Shell patterns."""
    everything: bool = False
    """Whether all works are held out: those of `data.held_out_source`."""

    @property
    def holds_any(self) -> bool:
        """Whether any work may be held out."""
        return self.everything or bool(self.works or self.patterns)

    def __contains__(self, work: str) -> bool:
        return self.everything or work in self.works or any(fnmatch.fnmatch(work, pattern) for pattern in self.patterns)


class WorkSizes:
    """Sizes of the works of a source, as far as it takes to choose among them.

    All of them up to `MOST_TRACKED`. Beyond, works with high hashes are forgotten: a work is tracked from its first
    document on or never, since the limit only falls.
    """

    def __init__(self, names: list[str]) -> None:
        """`names` of the job: each may be the name of a work or a pattern."""
        self.documents = 0
        """Documents so far."""
        self.bytes = 0
        """Their bytes."""
        self.tracked: dict[str, int] = {}
        """Works and their bytes."""
        self.forgot = False
        """Whether there are works that are not tracked."""
        self._limit = b"\xff" * 33
        self._patterns = {name: re.compile(fnmatch.translate(name)) for name in names}
        self.named: set[str] = set()
        """Entries of `names` that are the name of a work."""
        self.matched: set[str] = set()
        """Entries of `names` that match a work as patterns."""

    def add(self, work_bytes: Mapping[str, int], documents: int) -> None:
        """Count documents by their works."""
        self.documents += documents
        for work, size in work_bytes.items():
            self.bytes += size
            if work in self.tracked:
                self.tracked[work] += size
                continue
            for name, pattern in self._patterns.items():
                if work == name:
                    self.named.add(name)
                if name not in self.matched and pattern.match(work):
                    self.matched.add(name)
            if not self.forgot or _place(work) < self._limit:
                self.tracked[work] = size
            if len(self.tracked) > MOST_TRACKED:
                self._forget_half()

    def _forget_half(self) -> None:
        works = sorted(self.tracked, key=_place)
        self._limit, self.forgot = _place(works[len(works) // 2]), True
        self.tracked = {work: self.tracked[work] for work in works[: len(works) // 2]}


def choose_held_out(sizes: WorkSizes, names: list[str], share: float | None = None) -> HeldOut:
    """The works to hold out.

    `names`: the exact name of a work, or else a shell pattern, so that a work called `draft [2020]` or `star*` can be
    named, and no other is held out with it. If there are none, works are taken in the order of a hash of their names
    until `share` of the bytes are held out (5 %, at most 16 MiB, if None), passing over those that would make it more
    than twice as much. Raises JobError for a name that matches nothing, and if one of the sides would be empty.
    """
    if not names:
        return HeldOut(works=frozenset(_by_hash(sizes, share)))
    for name in names:
        if name not in sizes.named and name not in sizes.matched:
            count = f"more than {MOST_TRACKED}" if sizes.forgot else f"the {len(sizes.tracked)}"
            raise JobError(f"data.held_out: {name!r} matches none of {count} works{_hint(name, sizes.tracked)}")
    held_out = HeldOut(works=frozenset(sizes.named), patterns=tuple(name for name in names if name not in sizes.named))
    if all(work in held_out for work in sizes.tracked):
        raise JobError(f"data.held_out: {names} takes all {len(sizes.tracked)} works, which leaves none to train on")
    return held_out


def _by_hash(sizes: WorkSizes, share: float | None) -> set[str]:
    if len(sizes.tracked) == 1 and not sizes.forgot:
        raise JobError(
            f"data.held_out: the source is one work ({next(iter(sizes.tracked))}), which cannot be on both sides: "
            "add a file to data.source and name it here"
        )
    wanted = share * sizes.bytes if share else min(DEFAULT_SHARE * sizes.bytes, DEFAULT_BYTES)
    held_out: set[str] = set()
    size = 0
    for work in sorted(sizes.tracked, key=_place):
        if size >= wanted:
            break
        if size + sizes.tracked[work] <= 2 * wanted and len(held_out) < len(sizes.tracked) - 1:
            held_out.add(work)
            size += sizes.tracked[work]
    return held_out or {min(sizes.tracked, key=lambda name: (sizes.tracked[name], name))}


def _place(work: str) -> bytes:
    return hashlib.sha256(work.encode()).digest()


def _hint(pattern: str, works: Mapping[str, int]) -> str:
    close = difflib.get_close_matches(pattern, list(works)[:1000], n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f": {', '.join(sorted(works)[:5])}{' …' if len(works) > 5 else ''}"
