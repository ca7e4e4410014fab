"""The header of an `.idx` file: what can be said of an indexed dataset without reading it, and without numpy."""

import struct
from pathlib import Path
from typing import NamedTuple

from copus.job import JobError

MARK = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
"""Mark and version."""
COUNTS = "<BQQ"
"""Code of the id type, sequences, document bounds."""
HEADER_BYTES = len(MARK) + struct.calcsize(COUNTS)
"""Size of the header."""
ID_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Size of an id by the code of its type. Megatron also has codes of floats, which are no tokens."""


class IndexHeader(NamedTuple):
    """What the header says."""

    code: int
    """Code of the id type."""
    sequences: int
    """Sequences, each of which counts as a document."""


def with_suffix(prefix: Path, suffix: str) -> Path:
    """`<prefix><suffix>`: a prefix may have dots in it."""
    return prefix.with_name(prefix.name + suffix)


def is_prefix(path: Path) -> bool:
    """Whether there is an indexed dataset with this prefix."""
    return with_suffix(path, ".idx").is_file() and with_suffix(path, ".bin").is_file()


def read_header(prefix: Path) -> IndexHeader:
    """The header of a dataset. Raises JobError, one line, if it does not agree with the size of the file."""
    index = with_suffix(prefix, ".idx")
    try:
        size = index.stat().st_size
        with open(index, "rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise JobError(f"data.source: {index}: {error.strerror}") from None
    if len(header) < HEADER_BYTES or not header.startswith(MARK):
        raise JobError(f"data.source: {index}: not an index of Megatron's indexed dataset, version 1")
    code, count, bounds = struct.unpack(COUNTS, header[len(MARK) :])
    if code not in ID_BYTES:
        raise JobError(f"data.source: {index}: ids of type code {code} are not tokens: expected {list(ID_BYTES)}")
    expected = HEADER_BYTES + 12 * count + 8 * bounds
    if size not in (expected, expected + count):  # multimodal datasets have a byte more for each sequence
        raise JobError(f"data.source: {index}: {count} sequences take {expected} bytes, and the file has {size}")
    if not count:
        raise JobError(f"data.source: {index}: there is no document in it")
    return IndexHeader(code, count)
