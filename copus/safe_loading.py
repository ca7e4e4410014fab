"""Reading the index of a checkpoint without running anybody's code.

It is a pickle, which torch reads by pickle.load (torch/distributed/checkpoint/filesystem.py, `read_metadata`). A pickle
can name any function and call it. Checksums are no help: whoever makes the file makes the checksum.
"""

import pickle
from typing import IO, Any

import torch

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


def dump_metadata(metadata: Any, file: IO[bytes]) -> None:
    """Write what `load_metadata` reads, as torch does."""
    pickle.dump(metadata, file)
