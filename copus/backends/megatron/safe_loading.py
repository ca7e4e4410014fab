"""Reading checkpoints and indices without running anybody's code.

A pickle can name any function and call it. Checksums are no help: whoever makes the file makes the checksum. Four
places unpickle when megatron-core 0.16.1 loads a `torch_dist` checkpoint or opens a dataset, and each is closed here:

- `common.pt`: torch.load, safe by default, unless an environment variable says otherwise;
- `.metadata`: plain pickle.load (torch/distributed/checkpoint/filesystem.py, `read_metadata`);
- objects among the tensors: torch.load with weights_only=False (default_planner.py, `load_bytes`), which a forged
  `.metadata` can ask for;
- the order of the samples, `.npy` files in the data's cache: numpy.load with allow_pickle (gpt_dataset.py:579-599).
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(  # megatron leaves the plans of its ranks there too: plain records
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


@contextmanager
def data_only() -> Iterator[None]:
    """While it is entered, loading a checkpoint in this process yields tensors and plain values, or raises."""
    load, original = torch.load, filesystem.pickle

    def weights_only(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **{**options, "weights_only": True})

    torch.load = weights_only
    filesystem.pickle = SimpleNamespace(load=load_metadata, dump=pickle.dump)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load, filesystem.pickle = load, original


@contextmanager
def arrays_only() -> Iterator[None]:
    """While it is entered, `.npy` files are read in this process as plain arrays; others raise ValueError."""
    load = np.load

    def plain(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **{**options, "allow_pickle": False})

    np.load = plain
    try:
        yield
    finally:
        np.load = load
