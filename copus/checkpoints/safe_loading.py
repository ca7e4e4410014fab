"""Reading the index of a checkpoint without running anybody's code.

It is a pickle, which torch reads by pickle.load (torch/distributed/checkpoint/filesystem.py, `read_metadata`). A pickle
can name any function and call it. Checksums are no help: whoever makes the file makes the checksum.
"""

import contextlib
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch

from copus.user_errors import one_line

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),  # of the folder: torch's own writer leaves it there
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(  # megatron, which wrote the checkpoints of 0.1.0, left the plans of its ranks there too: plain records
        ("torch.distributed.checkpoint.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
"""All that torch writes into `.metadata`, beside numbers, text, containers and dtypes."""


class UnsafeCheckpointError(pickle.UnpicklingError):
    """A checkpoint that asks for something that no checkpoint of ours has in it."""


class DamagedFileError(ValueError):
    """A file of a checkpoint that is missing, cut off, or something else than it should be."""


_DAMAGE = (
    *(FileNotFoundError, EOFError, ValueError, TypeError, AttributeError, LookupError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
"""What reading a file that is missing, cut off or something else ends in."""


@contextlib.contextmanager
def damage_told() -> Iterator[None]:
    """Raise DamagedFileError in place of what reading a damaged file ends in. For the reading alone: the same types are
    raised by mistakes of the program's own."""
    try:
        yield
    except UnsafeCheckpointError:
        raise
    except _DAMAGE as error:
        raise DamagedFileError(one_line(error)) from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what is known to be harmless; a dtype is a constant."""
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeCheckpointError(f"the checkpoint's metadata asks for {module}.{name}, which it may not: not loaded")


def load_metadata(file: IO[bytes]) -> Any:
    """`pickle.load` for torch's `.metadata`. Raises UnsafeCheckpointError for anything that could run code."""
    return _Unpickler(file).load()


class _Inert:
    """Stands in for whatever a pickle asks for, and does nothing; it may be filled as a container is."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Drop an element."""

    def extend(self, values: Any) -> None:
        """Drop elements."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Nothing of anybody's: numbers, text and containers need no class."""
        return _Inert

    def persistent_load(self, identifier: Any) -> Any:
        """Tensors are not read."""
        return _Inert()


def load_plain_values(source: Path | IO[bytes]) -> Any:
    """The numbers, texts and containers in what torch has saved; in place of all other objects in it there is one that
    does nothing. Runs no code of the file's. Raises ValueError if it is no such file.

    `torch.load` is not asked: whatever it is given to unpickle with, it hands an archive of TorchScript to
    `torch.jit.load`, which runs what is in it.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            (record,) = (name for name in archive.namelist() if PurePosixPath(name).match("*/data.pkl"))
            return _PlainUnpickler(archive.open(record)).load()
    except (OSError, *_DAMAGE) as error:
        raise ValueError(f"not what torch saves: {error}") from None


def dump_metadata(metadata: Any, file: IO[bytes]) -> None:
    """Write what `load_metadata` reads, as torch does."""
    pickle.dump(metadata, file)
