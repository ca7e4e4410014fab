"""Reads training and held-out sequences through megatron-core's GPTDataset, in an order that only the seed decides."""

import contextlib
import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from copus.backends.megatron import cpu
from copus.backends.megatron.safe_loading import arrays_only
from copus.data.manifest import Manifest, read_manifest
from copus.durable import sync_folder
from copus.job import JobError
from copus.manifest import changed_since_checked, damage, describe, files_of, mark_checked, write_manifest, wrong_size
from copus.manifest import read_manifest as read_checksums

cpu.before_import()
import megatron.core  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402


class SampleReader:
    """The sequences of one side of a prepared folder, by index.

    The sequence at index i depends on the prepared data, `seq_len`, `seed` and i alone: not on batch, layout, ranks,
    restarts or the length of the job. To that end every pass over the data is a GPTDataset of one epoch with a seed of
    its own. With E = (tokens − 1) ÷ seq_len sequences in a pass, index i is place i mod E of pass i ÷ E. A pass puts
    the documents in a random order, joins them, cuts them into sequences (the last label of one is the first token of
    the next), drops the tokens that do not fill a sequence, and shuffles. Attention sees across the ends of documents,
    as it does in Megatron by default.

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
        self._prefix = os.fspath(prepared / split)
        self._split = Split[split]
        self._seq_len = seq_len
        self._seed = seed
        self._tokenizer = _Tokenizer(manifest)
        self._documents = GPTDataset.build_low_level_dataset(self._prefix, self._config(epoch=0))
        key = f"{megatron.core.__version__} {manifest.digest} {split} {seq_len} {seed}"
        self._cache = (cache or prepared / "indices") / hashlib.sha256(key.encode()).hexdigest()[:16]
        self._opened: tuple[int, GPTDataset] | None = None
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
            self._opened = (epoch, self._open(epoch, self._cache / str(epoch)))
        sample = self._opened[1][place]
        return sample["tokens"], sample["labels"]

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of the sequences first … first + count − 1, int64, (count, seq_len) each."""
        tokens, labels = zip(*(self[first + offset] for offset in range(count)), strict=True)
        return torch.stack(tokens), torch.stack(labels)

    def _write_indices(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            for epoch in range(-(-self._num_samples // self.samples_per_epoch)):
                self._write_index(epoch)
        if distributed:
            torch.distributed.barrier()

    def _write_index(self, epoch: int) -> None:
        """Have GPTDataset write the index of a pass beside its place, then rename: it trusts any index that it finds.

        One that is damaged is made again.
        """
        folder = self._cache / str(epoch)
        temporary = self._cache / f".{epoch}-{uuid.uuid4().hex}"
        try:
            if folder.is_dir():
                if _is_whole(folder):
                    return
                shutil.rmtree(folder)
            temporary.mkdir(parents=True)
            self._open(epoch, temporary)
            write_manifest(temporary, describe(temporary, files_of(temporary)))
            with contextlib.suppress(OSError):  # another job was faster; what it wrote is the same
                os.rename(temporary, folder)
            sync_folder(self._cache)
        except OSError as error:
            raise JobError(f"data.cache: cannot write {error.filename or temporary}: {error.strerror}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _open(self, epoch: int, folder: Path) -> GPTDataset:
        """The GPTDataset of a pass, with its index from `folder`, or (on rank 0) made and written there."""
        config = self._config(epoch)
        config.path_to_cache = os.fspath(folder)
        indices = np.arange(len(self._documents), dtype=np.int32)
        # the second argument is bookkeeping; a name instead of the path lets the folder be moved
        try:
            with arrays_only():
                dataset = GPTDataset(self._documents, self._split.name, indices, None, self._split, config)
        except ValueError as error:
            raise JobError(f"data.cache: {folder} has no order of samples in it: {error}; remove it") from None
        assert len(dataset) == self.samples_per_epoch, (len(dataset), self.samples_per_epoch)
        return dataset

    def _config(self, epoch: int) -> GPTDatasetConfig:
        return GPTDatasetConfig(
            random_seed=int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]),
            sequence_length=self._seq_len,
            blend_per_split=[([self._prefix], None), None, None],
            tokenizer=self._tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )


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


class _Tokenizer:
    """What GPTDataset asks of a tokenizer: its special tokens, and a name for the index."""

    pad = -1  # no token: nothing is padded

    def __init__(self, manifest: Manifest) -> None:
        self.eod = manifest.eod
        self.vocab_size = manifest.vocab
        self.unique_identifiers = {"blake2b": manifest.files["tokenizer.json"].blake2b}
