"""Token documents as Megatron's indexed dataset: `.bin` has the ids one after the other, `.idx` says where each
document begins. Many tools write and read the format; it takes no framework."""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEADER = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
"""Mark and version."""
_TYPES: tuple[tuple[int, type[np.integer], int], ...] = ((65_500, np.uint16, 8), (2**31, np.int32, 4))
"""Ids below this number, the type that they are kept in, and its code in the file; as Megatron chooses."""


class IndexedDocuments:
    """The documents of one side of a prepared folder, by number; mapped from the files."""

    def __init__(self, prefix: Path) -> None:
        index = prefix.with_suffix(".idx")
        with open(index, "rb") as file:
            header = file.read(len(_HEADER) + struct.calcsize("<BQQ"))
        code, count, _ = struct.unpack("<BQQ", header[len(_HEADER) :])
        dtype = next(dtype for _, dtype, known in _TYPES if known == code)
        self.lengths = np.memmap(index, np.int32, "r", len(header), (count,))
        """Tokens of each document."""
        self._starts = np.memmap(index, np.int64, "r", len(header) + 4 * count, (count,))
        self._ids = np.memmap(prefix.with_suffix(".bin"), dtype, "r")
        self._element_bytes = np.dtype(dtype).itemsize

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.integer]:
        """The ids start … stop − 1 of a document."""
        begin = int(self._starts[document]) // self._element_bytes
        return self._ids[begin + start : begin + stop]


def write_indexed(prefix: Path, documents: Iterable[NDArray[np.int64]], vocab: int) -> None:
    """Write `<prefix>.bin` and `<prefix>.idx`, durably. Ids are uint16 if `vocab` allows, else int32."""
    dtype, code = next((dtype, code) for limit, dtype, code in _TYPES if vocab < limit)
    lengths: list[int] = []
    with open(prefix.with_suffix(".bin"), "wb") as data:
        for document in documents:
            data.write(document.astype(dtype).tobytes())
            lengths.append(len(document))
        data.flush()
        os.fsync(data.fileno())
    sizes = np.array(lengths, np.int64)
    starts = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    with open(prefix.with_suffix(".idx"), "wb") as index:
        index.write(_HEADER + struct.pack("<BQQ", code, len(sizes), len(sizes) + 1))
        index.write(sizes.astype(np.int32).tobytes() + starts.astype(np.int64).tobytes())
        index.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())  # a document is one sequence
        index.flush()
        os.fsync(index.fileno())
