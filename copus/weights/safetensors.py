"""Hugging Face folders of `*.safetensors` files: which tensor lies where, and how such files are written. No torch.

A file is the length of its header (8 bytes, little-endian), the header (JSON: type, shape and byte range of every
tensor), and the numbers. So a part of a tensor is read without the rest of the file, and a file is written tensor by
tensor, which the `safetensors` package does only from memory that holds all of them.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from copus.job import JobError
from copus.reshard.table import ELEMENT_BYTES

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Says which file of a folder has which tensor, if there are several."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types of weights, by their names in the header and torch's."""

_LONGEST_HEADER = 100 * 2**20
_LONGEST_INDEX = 256 * 2**20


class StoredTensor(NamedTuple):
    """A tensor in a folder."""

    file: str
    """Name of the file, in the folder."""
    dtype: str
    """Type, as the header names it."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    length: int
    """In bytes."""


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder, by its name. Reads headers only.

    Raises JobError if there are no such files, or one is missing, cut off, or not what its header says.
    """
    try:
        tensors: dict[str, StoredTensor] = {}
        for file in sorted(_files_of(folder)):
            tensors |= _read_header(folder, file)
    except OSError as error:  # also a symbolic link that leads to itself
        raise JobError(f"{error.filename or folder}: {error.strerror}") from None
    return tensors


def _files_of(folder: Path) -> set[str]:
    """The names of the files with weights: those of the index, or one."""
    index = folder / INDEX
    if not index.exists() and not index.is_symlink():
        if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
            return {SINGLE}
        others = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = f"; {others[0]} is a pickle, which could run code: save it again as safetensors" if others else ""
        raise JobError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    if index.stat().st_size > _LONGEST_INDEX:
        raise JobError(f"{index}: {index.stat().st_size} bytes; an index has at most {_LONGEST_INDEX}")
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise JobError(f"{index}: not an index of safetensors files: it has no weight_map") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise JobError(f"{index} points to {file}, which is not a file of its folder")
        try:
            (folder / file).stat()
        except (FileNotFoundError, ValueError):  # no file can have a name with such characters
            raise JobError(f"{folder} is not complete: {INDEX} names {file}, which is not there") from None
    return files


def _read_header(folder: Path, name: str) -> dict[str, StoredTensor]:
    path = folder / name
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise JobError(f"{path} is cut off, or no safetensors file: {size} bytes, and a header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {tensor: _described(name, 8 + length, entry) for tensor, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise JobError(f"{path}: its header is not that of a safetensors file") from None
    for tensor, stored in tensors.items():
        if stored.dtype in DTYPES:
            expected = math.prod(stored.shape) * ELEMENT_BYTES[DTYPES[stored.dtype]]
            if stored.length != expected:
                raise JobError(f"{path}: {tensor} has {stored.length} bytes, not the {expected} of its shape")
    end = max((stored.offset + stored.length for stored in tensors.values()), default=8 + length)
    if end > size:
        raise JobError(f"{path} is cut off: {size} bytes, and its header says {end}")
    return tensors


def _described(file: str, start: int, entry: dict[str, Any]) -> StoredTensor:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not (all(isinstance(number, int) and number >= 0 for number in (first, last, *shape)) and first <= last):
        raise ValueError("no byte range or shape")
    return StoredTensor(file, entry["dtype"], shape, start + first, last - first)


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: str
    """torch's name of the type, one of `DTYPES`."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


def split_into_files(tensors: Iterable[Planned], largest_bytes: int) -> dict[str, list[Planned]]:
    """File name → its tensors, in order: one file, or several of at most `largest_bytes` unless one tensor is larger
    than that."""
    groups: list[list[Planned]] = [[]]
    used = 0
    for tensor in tensors:
        if groups[-1] and used + tensor.bytes > largest_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


def index_of(files: dict[str, list[Planned]]) -> dict[str, Any]:
    """The content of the index of several files."""
    tensors = [tensor for group in files.values() for tensor in group]
    sizes = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "total_size": sum(tensor.bytes for tensor in tensors),
    }
    return {"metadata": sizes, "weight_map": {tensor.name: file for file, group in files.items() for tensor in group}}


def write_header(file: IO[bytes], tensors: Sequence[Planned]) -> None:
    """Write the header of a file; the numbers of the tensors have to follow in the same order."""
    names = {torch_name: name for name, torch_name in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        shape, end = list(tensor.shape), position + tensor.bytes
        header[tensor.name] = {"dtype": names[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
