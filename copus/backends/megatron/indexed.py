"""Writes token documents as Megatron's indexed dataset (`.bin` and `.idx`), with Megatron's own writer."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from copus.backends.megatron import cpu

cpu.before_import()
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # noqa: E402


def write_indexed(prefix: Path, documents: Iterable[NDArray[np.int64]], vocab: int) -> None:
    """Write `<prefix>.bin` and `<prefix>.idx`, durably.

    A document is one sequence of the dataset; ids are uint16 where `vocab` allows, else int32.
    """
    data, index = (prefix.with_suffix(suffix) for suffix in (".bin", ".idx"))
    builder = IndexedDatasetBuilder(os.fspath(data), dtype=DType.optimal_dtype(vocab))
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(os.fspath(index))
    for path in (data, index):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
