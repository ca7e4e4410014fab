"""Training and held-out sequences of a prepared folder, in an order that only the seed and the weights decide; the same
for every backend. Within a dataset it is the order of Megatron's GPTDataset, whose part in it is numpy's."""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.step_contract import NOT_COUNTED, Batches
from copus.data.blend import Blend
from copus.data.indexed import IndexedDocuments
from copus.data.manifest import Side, Slice, read_manifest
from copus.data.packing import best_fit
from copus.durable import sync_folder
from copus.job import JobConfig, JobError
from copus.manifest import changed_since_checked, damage, describe, files_of, mark_checked, write_manifest, wrong_size
from copus.manifest import read_manifest as read_checksums

_FORMAT = "order 1"
"""Format of the files of an order; another format gets other folders."""


def open_data(job: JobConfig, prepared: Path) -> tuple[Batches, Batches]:
    """Training and held-out sequences of a job. The held-out ones are the same in every job. Collective.

    Labels that do not count are −100: those that `data.eod_mask_loss` leaves out, and all of a conversation that the
    assistant does not say. With `data.reset_attention_mask` or `data.reset_position_ids` two more tensors have the
    positions of the tokens and the numbers of their documents; what is not reset counts on from the beginning.
    """
    data, seq_len = job.data, job.model.seq_len
    packs = data.packing == "best-fit"
    options = Options(data.eod_mask_loss, data.reset_position_ids, data.reset_attention_mask, packs)
    train = SampleReader(prepared, "train", seq_len, job.total_samples, job.training.seed, options=options)
    valid = SampleReader(prepared, "valid", seq_len, job.evaluate_sequences, seed=0, options=options)
    return train.batch, valid.batch


class Options(NamedTuple):
    """What else is said of a sequence, by Megatron's names."""

    eod_mask_loss: bool = False
    """Whether the loss of the token that follows the end of a document is left out."""
    reset_position_ids: bool = False
    """Whether positions begin anew with each document."""
    reset_attention_mask: bool = False
    """Whether tokens attend to their own document alone."""
    packs: bool = False
    """Whether documents are packed whole, with padding, instead of joined and cut."""


PLAIN = Options()
"""Nothing else."""


class _Piece(NamedTuple):
    """Part of a document in a sequence."""

    document: int
    """Number of the document."""
    first: int
    """Its first token."""
    last: int
    """The token after its last."""


class _Joined(NamedTuple):
    """One pass over documents that are joined and cut; arrays that lie in files."""

    documents: np.ndarray
    """Numbers of the documents as they are joined, int32."""
    starts: np.ndarray
    """Where each of them begins in the joined text, in tokens, and where the last one ends: int64."""
    sequences: np.ndarray
    """Numbers of the sequences of the joined text as they are read."""

    def pieces(self, place: int, seq_len: int) -> Iterator[_Piece]:
        """Those of the sequence at a place and the token after it."""
        start = int(self.sequences[place]) * seq_len
        stop = start + seq_len + 1
        number = int(np.searchsorted(self.starts, start, "right")) - 1
        while start < stop:
            begin, end = int(self.starts[number]), int(self.starts[number + 1])
            last = min(stop, end)
            if last > start:
                yield _Piece(int(self.documents[number]), start - begin, last - begin)
            start, number = last, number + 1


class _Packed(NamedTuple):
    """One pass over documents that are packed; arrays that lie in files."""

    documents: np.ndarray
    firsts: np.ndarray
    lasts: np.ndarray
    bounds: np.ndarray
    """As in `copus.data.packing.Packed`."""
    sequences: np.ndarray
    """Numbers of the sequences as they are read."""

    def pieces(self, place: int, seq_len: int) -> Iterator[_Piece]:
        """Those of the sequence at a place: at most seq_len + 1 tokens."""
        sequence = int(self.sequences[place])
        for piece in range(int(self.bounds[sequence]), int(self.bounds[sequence + 1])):
            yield _Piece(int(self.documents[piece]), int(self.firsts[piece]), int(self.lasts[piece]))


class SampleReader:
    """The sequences of one side of a prepared folder, by index.

    The sequence at index i depends on the prepared data, `seq_len`, `seed` and i alone: not on batch, layout, ranks,
    restarts or the length of the job. A blend takes it from the dataset that `Blend.locate` names. Collective, as
    `DatasetReader`, whose errors it raises.
    """

    def __init__(
        self,
        prepared: Path,
        split: Side,
        seq_len: int,
        num_samples: int,
        seed: int,
        cache: Path | None = None,
        options: Options = PLAIN,
    ) -> None:
        manifest = read_manifest(prepared)
        slices = manifest.slices(split)
        if not slices:
            raise JobError(f"data: the {split} side is empty")
        self._num_samples = num_samples
        self._blend = Blend([weight for _, weight in slices])
        counts = self._blend.taken(num_samples)
        self._datasets = []
        for number, ((dataset, _), count) in enumerate(zip(slices, counts, strict=True)):
            key = f"{_FORMAT} {manifest.digest} {split} {seq_len} {seed}" + (f" {number}" if len(slices) > 1 else "")
            key += " packed" if options.packs else ""
            folder = (cache or prepared / "indices") / hashlib.sha256(key.encode()).hexdigest()[:16]
            self._datasets.append(DatasetReader(prepared, split, dataset, seq_len, count, seed, folder, options))

    def __len__(self) -> int:
        """The number of sequences that was asked for; they may take several passes."""
        return self._num_samples

    @property
    def samples_per_epoch(self) -> int:
        """Sequences in one pass over the data; in a blend, in one pass over each of its datasets."""
        return sum(dataset.samples_per_epoch for dataset in self._datasets)

    def __getitem__(self, sample_index: int) -> tuple[torch.Tensor, ...]:
        """Tokens and labels of a sequence, int64, (seq_len,) each, and if one of them is reset positions and documents.
        There is no padding, unless documents are packed: then its labels do not count."""
        if not 0 <= sample_index < self._num_samples:
            raise IndexError(f"sample {sample_index} of {self._num_samples}")
        number, index = self._blend.locate(sample_index)
        return self._datasets[number].sequence(index)

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, ...]:
        """The same of the sequences first … first + count − 1, int64, (count, seq_len) each."""
        return tuple(map(torch.stack, zip(*(self[first + offset] for offset in range(count)), strict=True)))


class DatasetReader:
    """The sequences of one dataset, by index.

    Every pass over the dataset has a seed of its own. With E = (tokens − 1) ÷ seq_len sequences in a pass, index i is
    place i mod E of pass i ÷ E. A pass puts the documents in a random order, joins them, cuts them into sequences (the
    last label of one is the first token of the next), drops the tokens that do not fill a sequence, and shuffles. If
    documents are packed, E is the number of sequences that they take.

    Collective: where torch.distributed is initialized, every rank makes its reader at the same time with the same
    arguments; rank 0 writes the indices that are missing, then all meet at one barrier of the default group. No
    process group is kept, so that a reader outlives them. All ranks must see `cache`.

    Held-out losses compare only where the same sequences are read: give the "valid" reader the same seed in every job.

    Raises JobError if the side has fewer than seq_len + 1 tokens, or the cache cannot be written.
    """

    def __init__(
        self,
        prepared: Path,
        split: Side,
        dataset: Slice,
        seq_len: int,
        num_samples: int,
        seed: int,
        cache: Path,
        options: Options = PLAIN,
    ) -> None:
        self._documents = IndexedDocuments(prepared / dataset.prefix, dataset.first, dataset.documents)
        self._order_kind = _Packed if options.packs else _Joined
        self._num_samples = num_samples
        self._seq_len = seq_len
        self._seed = seed
        self._options = options
        self._learned = np.memmap(prepared / f"{dataset.prefix}.mask", np.uint8, "r") if dataset.mask else None
        self._cache = cache
        self._opened: tuple[int, _Joined | _Packed] | None = None
        if options.packs:  # how many sequences that takes is known when the first pass is packed
            self._write_indices([0])
            self.samples_per_epoch = len(self._open(cache / "0").sequences)
            """E: sequences in one pass over the data."""
        else:
            self.samples_per_epoch = (dataset.tokens - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise JobError(
                f"data: the {split} side has {dataset.tokens} tokens < model.seq_len({seq_len}) + 1 = {seq_len + 1}"
            )
        self._write_indices(range(-(-num_samples // self.samples_per_epoch)))

    def sequence(self, index: int) -> tuple[torch.Tensor, ...]:
        """Tokens and labels of a sequence, and if one of them is reset positions and documents: int64, (seq_len,)
        each."""
        epoch, place = divmod(index, self.samples_per_epoch)
        if self._opened is None or self._opened[0] != epoch:  # one pass at a time: every one holds files open
            self._opened = (epoch, self._open(self._cache / str(epoch)))
        order = self._opened[1]
        pieces = list(order.pieces(place, self._seq_len))
        ids = np.concatenate([self._documents.read(piece.document, piece.first, piece.last) for piece in pieces])
        padding = self._seq_len + 1 - len(ids)
        tokens = torch.from_numpy(np.pad(ids.astype(np.int64), (0, padding), "edge"))
        labels = tokens[1:]
        if self._options.eod_mask_loss or self._options.packs or self._learned is not None:
            counted = np.pad(np.concatenate([self._counted(piece) for piece in pieces]), (0, padding))[1:]
            labels = labels.masked_fill(torch.from_numpy(counted == 0), NOT_COUNTED)
        if not (self._options.reset_position_ids or self._options.reset_attention_mask):
            return tokens[:-1], labels
        lengths = torch.tensor([*(piece.last - piece.first for piece in pieces), *[padding] * (padding > 0)])
        positions, documents = torch.arange(self._seq_len), torch.zeros(self._seq_len, dtype=torch.int64)
        if self._options.reset_position_ids:
            positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[:-1]
        if self._options.reset_attention_mask:
            documents = torch.arange(len(lengths)).repeat_interleave(lengths)[:-1]
        return tokens[:-1], labels, positions, documents

    def _counted(self, piece: _Piece) -> np.ndarray:
        """1 for each token of a piece whose loss counts."""
        counted = np.ones(piece.last - piece.first, np.uint8)
        if self._learned is not None:
            at = self._documents.place(piece.document)
            counted[:] = self._learned[at + piece.first : at + piece.last]
        # The first token of a piece follows another document: its end, or, of a conversation that was cut, any token.
        if (self._options.eod_mask_loss and piece.first == 0) or (self._options.packs and piece.first > 0):
            counted[0] = 0
        return counted

    def _write_indices(self, epochs: Iterable[int]) -> None:
        """Write the orders of some passes that are not there. Collective."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            for epoch in epochs:
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
        lengths = self._documents.lengths
        arrays: tuple[np.ndarray, ...]
        if self._options.packs:
            arrays = best_fit(lengths, documents, self._seq_len + 1)
            count = len(arrays[-1]) - 1
        else:
            arrays = (documents, np.concatenate([[0], np.cumsum(lengths[documents], dtype=np.int64)]))
            count = self.samples_per_epoch
        sequences = np.arange(count, dtype=np.int64 if count > 2**32 - 3 else np.uint32)
        random.shuffle(sequences)
        for name, array in zip(self._order_kind._fields, (*arrays, sequences), strict=True):
            np.save(folder / f"{name}.npy", array)

    def _open(self, folder: Path) -> _Joined | _Packed:
        try:  # mapped, and so never unpickled
            names = self._order_kind._fields
            order = self._order_kind(*(np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in names))
        except (OSError, ValueError) as error:
            raise JobError(f"data.cache: {folder} has no order of samples in it: {error}; remove it") from None
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
