"""Token documents as Megatron's indexed dataset: `.bin` has the ids one after the other, `.idx` says where each
document begins. Many tools write and read the format; it takes no framework.

Layout of `.idx`, little-endian: 9 bytes `MMIDIDX\\0\\0`, uint64 version 1, uint8 code of the id type, uint64 number of
sequences n, uint64 number of document bounds; then int32 lengths (n), int64 offsets in bytes (n), and the bounds. As in
Megatron's GPTDataset, every sequence counts as a document.
"""

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from copus.data.index_header import COUNTS, HEADER_BYTES, ID_BYTES, MARK, read_header, with_suffix
from copus.job import JobError

_CODES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Types of ids by their code in the file."""
_CHUNK = 1 << 22  # documents or ids that are looked at together, so that memory stays bounded


class IndexedDocuments:
    """Documents of an indexed dataset, by number; mapped from the files."""

    def __init__(self, prefix: Path, first: int = 0, count: int | None = None) -> None:
        """The `count` documents from `first` on; all that follow if None."""
        code, total = read_header(prefix)
        index = with_suffix(prefix, ".idx")
        count = total - first if count is None else count
        dtype = _CODES[code]
        self.lengths = np.memmap(index, np.int32, "r", HEADER_BYTES + 4 * first, (count,))
        """Tokens of each document."""
        self._starts = np.memmap(index, np.int64, "r", HEADER_BYTES + 4 * total + 8 * first, (count,))
        self._ids = np.memmap(with_suffix(prefix, ".bin"), dtype, "r")
        self._element_bytes = np.dtype(dtype).itemsize

    def __len__(self) -> int:
        return len(self.lengths)

    def place(self, document: int) -> int:
        """Where a document begins, in tokens from the beginning of the file."""
        return int(self._starts[document]) // self._element_bytes

    def read(self, document: int, start: int, stop: int) -> NDArray[np.integer]:
        """The ids start … stop − 1 of a document."""
        begin = self.place(document)
        return self._ids[begin + start : begin + stop]


class IndexedWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx` in bounded memory; a document may come in several pieces.

    Its `state` is a few numbers: a writer that is made with it goes on where that one was, whatever has been written
    since.
    """

    def __init__(self, prefix: Path, vocab: int, state: dict[str, int] | None = None) -> None:
        """Ids are uint16 if `vocab` allows, else int32; as Megatron chooses."""
        self.dtype: type[np.integer] = np.uint16 if vocab < 65_500 else np.int32
        state = state or {"tokens": 0, "documents": 0, "unfinished": 0}
        self.tokens, self.documents, self._unfinished = state["tokens"], state["documents"], state["unfinished"]
        self._prefix = prefix
        self._lengths_path = with_suffix(prefix, ".lengths")
        self._ids = _open_at(with_suffix(prefix, ".bin"), self.tokens * np.dtype(self.dtype).itemsize)
        self._lengths = _open_at(self._lengths_path, self.documents * 4)

    @property
    def is_inside_document(self) -> bool:
        """Whether the last document is not complete."""
        return self._unfinished > 0

    def write(self, ids: NDArray[np.integer], lengths: NDArray[np.integer], *, ends: bool = True) -> None:
        """Append documents of these lengths. Without `ends` the last one goes on in the next call."""
        if not len(lengths):
            return
        lengths = np.array(lengths, np.int32)
        lengths[0] += self._unfinished
        self._unfinished = 0 if ends else int(lengths[-1])
        self._ids.write(ids.astype(self.dtype, copy=False).tobytes())
        whole = lengths if ends else lengths[:-1]
        self._lengths.write(whole.tobytes())
        self.tokens += len(ids)
        self.documents += len(whole)

    def state(self) -> dict[str, int]:
        """What was written so far; it is on disk when this returns."""
        for file in (self._ids, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        return {"tokens": self.tokens, "documents": self.documents, "unfinished": self._unfinished}

    def close(self) -> None:
        """Release the files. What was written stays, for a writer that goes on from `state`."""
        self._ids.close()
        self._lengths.close()

    def finish(self) -> None:
        """Write the index, durably."""
        assert not self.is_inside_document
        self.state()
        self.close()
        code = next(code for code, dtype in _CODES.items() if dtype is self.dtype)
        lengths = np.memmap(self._lengths_path, np.int32, "r") if self.documents else np.empty(0, np.int32)
        with open(with_suffix(self._prefix, ".idx"), "wb") as index:
            index.write(MARK + struct.pack(COUNTS, code, self.documents, self.documents + 1))
            for chunk in _chunks(lengths):
                index.write(chunk.tobytes())
            start = 0
            for chunk in _chunks(lengths):
                ends = start + np.cumsum(chunk, dtype=np.int64) * np.dtype(self.dtype).itemsize
                index.write(np.concatenate([[start], ends[:-1]]).astype(np.int64).tobytes())
                start = int(ends[-1])
            for first in range(0, self.documents + 1, _CHUNK):  # a document is one sequence
                index.write(np.arange(first, min(first + _CHUNK, self.documents + 1), dtype=np.int64).tobytes())
            index.flush()
            os.fsync(index.fileno())
        del lengths
        self._lengths_path.unlink()


def check_index(prefix: Path) -> None:
    """Read the whole index of a dataset that somebody else made. Raises JobError, one line, if it is broken."""
    code = read_header(prefix).code
    data = with_suffix(prefix, ".bin")
    try:
        data_bytes = data.stat().st_size
    except OSError as error:
        raise JobError(f"data.source: {data}: {error.strerror}") from None
    if not data_bytes:
        raise JobError(f"data.source: {data}: there is no token in it")
    _check_places(with_suffix(prefix, ".idx"), data, IndexedDocuments(prefix), data_bytes, ID_BYTES[code])


def _check_places(index: Path, data: Path, documents: IndexedDocuments, data_bytes: int, id_bytes: int) -> None:
    """Raise JobError if the index points outside of the data."""
    for first in range(0, len(documents), _CHUNK):
        lengths = documents.lengths[first : first + _CHUNK].astype(np.int64)
        starts = documents._starts[first : first + _CHUNK]
        wrong = (lengths < 0) | (starts < 0) | (starts % id_bytes != 0) | (starts + lengths * id_bytes > data_bytes)
        if wrong.any():
            place = int(wrong.argmax())
            raise JobError(
                f"data.source: {index}: document {first + place} of {lengths[place]} tokens at byte {starts[place]} is "
                f"not in {data.name}, which has {data_bytes} bytes"
            )


def largest_id(prefix: Path, vocab: int, advance: Callable[[int], None] = lambda count: None) -> int:
    """The largest id of a dataset, every one looked at. Raises JobError for an id that is no token of the vocabulary.

    `advance` is called with the number of bytes that were read since the last call.
    """
    ids = IndexedDocuments(prefix)._ids
    largest = 0
    for first in range(0, len(ids), _CHUNK):
        chunk = ids[first : first + _CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab:
            wrong = low if low < 0 else high
            raise JobError(
                f"data.source: {with_suffix(prefix, '.bin')} has the token id {wrong}, and model.vocab is {vocab}"
            )
        largest = max(largest, high)
        advance(chunk.nbytes)
    return largest


def _open_at(path: Path, size: int) -> BinaryIO:
    """A file to append to, cut to `size` bytes."""
    file = open(path, "r+b" if path.exists() else "wb")  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file


def _chunks(values: NDArray[Any]) -> Iterable[NDArray[Any]]:
    return (values[first : first + _CHUNK] for first in range(0, len(values), _CHUNK))
