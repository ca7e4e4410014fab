"""Training and held-out sequences of a prepared folder, in an order that only the seed decides; the same for every
backend. It is the order of Megatron's GPTDataset, whose part in it is numpy's."""

import contextlib
import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.step_contract import Batches
from copus.data.indexed import IndexedDocuments
from copus.data.manifest import read_manifest
from copus.durable import sync_folder
from copus.job import JobConfig, JobError
from copus.manifest import changed_since_checked, damage, describe, files_of, mark_checked, write_manifest, wrong_size
from copus.manifest import read_manifest as read_checksums

_FORMAT = "order 1"
"""Of the files of an order; another one gets other folders."""


def open_data(job: JobConfig, prepared: Path) -> tuple[Batches, Batches]:
    """Training and held-out sequences of a job. The held-out ones are the same in every job. Collective."""
    seq_len = job.model.seq_len
    train = SampleReader(prepared, "train", seq_len, job.total_samples, job.training.seed)
    valid = SampleReader(prepared, "valid", seq_len, job.evaluate_sequences, seed=0)
    return train.batch, valid.batch


class _Order(NamedTuple):
    """One pass over the data; arrays that lie in files."""

    documents: np.ndarray
    """Numbers of the documents as they are joined, int32."""
    starts: np.ndarray
    """Where each of them begins in the joined text, in tokens, and where the last one ends: int64."""
    sequences: np.ndarray
    """Numbers of the sequences of the joined text as they are read."""


class SampleReader:
    """The sequences of one side of a prepared folder, by index.

    The sequence at index i depends on the prepared data, `seq_len`, `seed` and i alone: not on batch, layout, ranks,
    restarts or the length of the job. To that end every pass over the data has a seed of its own. With
    E = (tokens − 1) ÷ seq_len sequences in a pass, index i is place i mod E of pass i ÷ E. A pass puts the documents in
    a random order, joins them, cuts them into sequences (the last label of one is the first token of the next), drops
    the tokens that do not fill a sequence, and shuffles. Attention sees across the ends of documents, as it does in
    Megatron by default.

    Collective: where torch.distributed is initialized, every rank makes its reader at the same time with the same
    arguments; rank 0 writes the indices that are missing, then all meet at one barrier of the default group. No
    process group is kept, so that a reader outlives them. All ranks must see `cache`, which is `<prepared>/indices`
    unless given.

    Held-out losses compare only where the same sequences are read: give the "valid" reader the same seed in every job.

    Raises JobError where the side has fewer than seq_len + 1 tokens, and where the cache cannot be written.
    """

    def __init__(
        self,
        prepared: Path,
        split: Literal["train", "valid"],
        seq_len: int,
        num_samples: int,
        seed: int,
        cache: Path | None = None,
    ) -> None:
        manifest = read_manifest(prepared)
        tokens = manifest.tokens(split)
        self.samples_per_epoch = (tokens - 1) // seq_len
        """E: sequences in one pass over the data."""
        if self.samples_per_epoch < 1:
            raise JobError(f"data: the {split} side has {tokens} tokens < model.seq_len({seq_len}) + 1 = {seq_len + 1}")
        self._num_samples = num_samples
        self._seq_len = seq_len
        self._seed = seed
        self._documents = IndexedDocuments(prepared / split)
        key = f"{_FORMAT} {manifest.digest} {split} {seq_len} {seed}"
        self._cache = (cache or prepared / "indices") / hashlib.sha256(key.encode()).hexdigest()[:16]
        self._opened: tuple[int, _Order] | None = None
        self._write_indices()

    def __len__(self) -> int:
        """The number of sequences that was asked for; they may take several passes."""
        return self._num_samples

    def __getitem__(self, sample_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of a sequence, int64, (seq_len,) each. There is no padding: every label counts."""
        if not 0 <= sample_index < self._num_samples:
            raise IndexError(f"sample {sample_index} of {self._num_samples}")
        epoch, place = divmod(sample_index, self.samples_per_epoch)
        if self._opened is None or self._opened[0] != epoch:  # one pass at a time: every one holds files open
            self._opened = (epoch, self._open(self._cache / str(epoch)))
        tokens = torch.from_numpy(self._read(self._opened[1], place))
        return tokens[:-1], tokens[1:]

    def _read(self, order: _Order, place: int) -> np.ndarray:
        """The tokens of a sequence and the one after them, int64."""
        start = int(order.sequences[place]) * self._seq_len
        stop = start + self._seq_len + 1
        first = int(np.searchsorted(order.starts, start, "right")) - 1
        parts = []
        while start < stop:
            begin, end = int(order.starts[first]), int(order.starts[first + 1])
            parts.append(self._documents.read(int(order.documents[first]), start - begin, min(stop, end) - begin))
            start, first = min(stop, end), first + 1
        return np.concatenate(parts).astype(np.int64)

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of the sequences first … first + count − 1, int64, (count, seq_len) each."""
        tokens, labels = zip(*(self[first + offset] for offset in range(count)), strict=True)
        return torch.stack(tokens), torch.stack(labels)

    def _write_indices(self) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            for epoch in range(-(-self._num_samples // self.samples_per_epoch)):
                self._write_index(epoch)
        if dist.is_initialized():
            dist.barrier()

    def _write_index(self, epoch: int) -> None:
        """Write the order of a pass beside its place, then rename. One that is damaged is made again."""
        folder = self._cache / str(epoch)
        temporary = self._cache / f".{epoch}-{uuid.uuid4().hex}"
        try:
            if folder.is_dir():
                if _is_whole(folder):
                    return
                shutil.rmtree(folder)
            temporary.mkdir(parents=True)
            self._write_order(epoch, temporary)
            write_manifest(temporary, describe(temporary, files_of(temporary)))
            with contextlib.suppress(OSError):  # another job was faster; what it wrote is the same
                os.rename(temporary, folder)
            sync_folder(self._cache)
        except OSError as error:
            raise JobError(f"data.cache: cannot write {error.filename or temporary}: {error.strerror}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_order(self, epoch: int, folder: Path) -> None:
        """As GPTDataset does it: shuffle the documents, join them, and shuffle the sequences of the joined text."""
        random = np.random.RandomState(int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]))
        documents = np.arange(len(self._documents), dtype=np.int32)
        random.shuffle(documents)
        sequences = np.arange(
            self.samples_per_epoch, dtype=np.int64 if self.samples_per_epoch > 2**32 - 3 else np.uint32
        )
        random.shuffle(sequences)
        starts = np.concatenate([[0], np.cumsum(self._documents.lengths[documents], dtype=np.int64)])
        for name, array in zip(_Order._fields, (documents, starts, sequences), strict=True):
            np.save(folder / f"{name}.npy", array)

    def _open(self, folder: Path) -> _Order:
        try:  # mapped, and so never unpickled
            order = _Order(*(np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in _Order._fields))
        except (OSError, ValueError) as error:
            raise JobError(f"data.cache: {folder} has no order of samples in it: {error}; remove it") from None
        assert len(order.sequences) == self.samples_per_epoch, (len(order.sequences), self.samples_per_epoch)
        return order


def _is_whole(folder: Path) -> bool:
    """Whether an index is as it was written; its content is read only if a file has changed since."""
    try:
        files = read_checksums(folder)
    except ValueError:
        return False
    if wrong_size(folder, files):
        return False
    if changed_since_checked(folder, files):
        if damage(folder, files):
            return False
        mark_checked(folder)
    return True
