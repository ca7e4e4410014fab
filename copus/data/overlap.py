"""Finds training documents whose text is held out: the same text, or much of it.

Documents are compared by their word 8-grams (shingles; Broder 1997, "On the resemblance and containment of
documents"), case and punctuation aside. Texts that have nothing to do with each other share under 0.5 % of them; a
fifth is never chance. What this cannot see is the same work in another spelling or translation: there only a table of
works helps.

Of much held-out text only shingles whose hash divides by some number are kept, on both sides (a sketch modulo m,
Broder 1997, section 4), so that memory stays bounded; shares of shingles are then estimates.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from copus.data.documents import Document

SHINGLE_WORDS = 8
"""Words in a shingle."""
NEAR_DUPLICATE = 0.2
"""Share of a document's shingles from which on it counts as contained in another one."""
MIN_SHINGLES = 50
"""Held-out documents shorter than this are too short to be found inside a longer one: they may be a common phrase."""

MOST_SHINGLES = 4_000_000
"""Shingles of held-out text that are kept; of more, a part."""

_WORD = re.compile(r"\w+")
_MOST_REMEMBERED, _LONGEST_REMEMBERED = 1 << 16, 32
"""Words whose codes are remembered, and their characters: some 10 MB."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class _Codes(dict[str, int]):
    """CRC-32 of words. Nearly every word of a text has occurred before, and looking up is a fifth of the work."""

    def __missing__(self, word: str) -> int:
        code = zlib.crc32(word.encode())
        if len(word) <= _LONGEST_REMEMBERED:
            if len(self) >= _MOST_REMEMBERED:
                self.clear()
            self[word] = code
        return code


_codes = _Codes()


def word_codes(text: str) -> NDArray[np.uint64]:
    """The words of a text, case and punctuation aside, as one number each."""
    words = _WORD.findall(text.casefold())
    return np.fromiter(map(_codes.__getitem__, words), dtype=np.uint64, count=len(words))


def shingles(codes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes of the distinct word 8-grams, sorted; empty for a text of fewer than 8 words."""
    count = codes.size - SHINGLE_WORDS + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):
        hashes = hashes * _MULTIPLIER + codes[offset : offset + count]  # modulo 2⁶⁴
    hashes.sort()  # np.unique keeps a table, which takes seven times as long
    return hashes[np.append(True, hashes[1:] != hashes[:-1])]


class HeldOutText:
    """The held-out documents, indexed by shingle."""

    def __init__(self, documents: Iterable[Document]) -> None:
        """A long document that comes in pieces counts as so many documents."""
        self._names: list[str] = []
        self._exact: dict[bytes, str] = {}
        self._modulus = np.uint64(1)
        parts: list[NDArray[np.uint64]] = []
        kept = 0
        for document in documents:
            codes = word_codes(document.text)
            self._names.append(document.name)
            self._exact[_digest(codes)] = document.name
            parts.append(self._sketch(shingles(codes)))
            kept += parts[-1].size
            while kept > MOST_SHINGLES:
                self._modulus *= np.uint64(2)
                parts = [self._sketch(part) for part in parts]
                kept = sum(part.size for part in parts)
        hashes = np.concatenate([np.empty(0, dtype=np.uint64), *parts])
        owners = np.repeat(np.arange(len(parts), dtype=np.int32), [part.size for part in parts])
        order = np.argsort(hashes, kind="stable")
        self._sizes = np.array([part.size for part in parts], np.int64)
        self._hashes, self._owners = hashes[order], owners[order]

    def _sketch(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return hashes if self._modulus == 1 else hashes[hashes % self._modulus == 0]

    def reason_to_drop(self, document: Document) -> str | None:
        """Why a training document may not be trained on; None when it shares too little with what is held out."""
        codes = word_codes(document.text)
        if codes.size and (name := self._exact.get(_digest(codes))):
            return f"same text as held-out {name}"
        if not self._hashes.size:
            return None
        own = self._sketch(shingles(codes))
        first = np.searchsorted(self._hashes, own, side="left")
        is_held_out = np.take(self._hashes, first, mode="clip") == own
        if not is_held_out.any():
            return None
        matched, first = own[is_held_out], first[is_held_out]
        counts = np.searchsorted(self._hashes, matched, side="right") - first
        # every (shingle, held-out document) pair that matches: `counts` consecutive places from `first` on
        places = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        shared = np.bincount(self._owners[places], minlength=len(self._names))
        contained = matched.size / own.size
        if contained >= NEAR_DUPLICATE:
            nearest = self._names[int(shared.argmax())]
            return f"{contained:.0%} of its {SHINGLE_WORDS}-grams are in held-out text, most in {nearest}"
        share = np.where(self._sizes >= MIN_SHINGLES, shared / np.maximum(self._sizes, 1), 0.0)
        most = int(share.argmax())
        if share[most] >= NEAR_DUPLICATE:
            return f"contains {share[most]:.0%} of the {SHINGLE_WORDS}-grams of held-out {self._names[most]}"
        return None


def _digest(codes: NDArray[np.uint64]) -> bytes:
    return hashlib.blake2b(codes.tobytes(), digest_size=16).digest()
