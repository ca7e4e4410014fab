"""Where the prepared data of a job is, and whether it is fit for the job. Imports neither torch nor megatron.

Prepared data is a folder `<data.cache>/data/<digest>`, named after its content (`Manifest.digest`), complete or not
there. `<data.cache>/data/inputs/<key>` says which digest a job's inputs were turned into: the key is a hash of the
texts and of everything else that the data depends on. A run does not ask that way: its `job.yaml` names the digest in
`data.prepared`, so that a change to the text has no effect on it.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import get_args

from copus.data import shakespeare
from copus.data.held_out import choose_held_out
from copus.data.manifest import FORMAT_VERSION, Manifest, Side, Source, damaged, read_manifest
from copus.data.sources import Document, file_sha256, read_documents, source_files
from copus.data.tokenizer import SMALLEST_VOCAB, check_spelling, check_tokenizer, load_tokenizer
from copus.durable import replace_text
from copus.job import DIGEST, DataConfig, JobConfig, JobError
from copus.manifest import changed_since_checked

MOST_PASSES = 10_000
"""Most passes over a side of the data. The order of each pass is a file."""


def find_prepared(job: JobConfig) -> Path | None:
    """The folder of a job's prepared data, or None if there is none.

    Looks for the digest that the job names, or else for what its inputs were turned into. Raises JobError if a file of
    the source cannot be read.
    """
    digest = job.data.prepared or _remembered(job)
    folder = data_folder(job) / digest if digest else None
    return folder if folder and folder.is_dir() else None


def prepared_path(job: JobConfig) -> Path:
    """The folder of a job's prepared data. Raises JobError if there is none."""
    folder = find_prepared(job)
    if folder is None:
        named = f" {job.data.prepared}" if job.data.prepared else ""
        raise JobError(f"data: the prepared data{named} is not in {data_folder(job)}: run `copus data` with this job")
    return folder


def data_folder(job: JobConfig) -> Path:
    """The folder in which prepared data is kept."""
    return job.data.cache.expanduser() / "data"


def input_key(job: JobConfig) -> str:
    """A hash of everything that the prepared data depends on: texts, held-out works, tokenizer, vocabulary and format.

    Seed, sequence length and batch are not among them. Raises JobError if a file cannot be read.
    """
    data = job.data
    depends_on = {
        "format": FORMAT_VERSION,
        "sources": [source.model_dump() for source in sources(data)],
        "held_out": sorted(_held_out_names(data)),
        "tokenizer": file_sha256(data.tokenizer.expanduser()) if data.tokenizer else None,
        "vocab": job.model.vocab,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def remember(job: JobConfig, key: str, digest: str) -> None:
    """Note that the inputs with this key were turned into the data with this digest. Raises OSError."""
    path = data_folder(job) / "inputs" / key
    path.parent.mkdir(exist_ok=True)
    replace_text(path, digest + "\n")


def _remembered(job: JobConfig) -> str | None:
    """The digest of what the job's inputs were turned into, if that has been done."""
    path = data_folder(job) / "inputs" / input_key(job)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        digest = path.read_text(encoding="utf-8").strip()
        return digest if re.fullmatch(DIGEST, digest) else None
    return None


def check_data(job: JobConfig) -> None:
    """Find everything that is wrong with a job's data before anything is fetched or made. Raises JobError.

    Prepared data is checked by its manifest and the sizes of its files. If there is none, the user's own files are
    read. Downloads and writes nothing.
    """
    folder = find_prepared(job)
    if folder is not None:
        check_prepared(job, folder)
        return
    try:
        _check_inputs(job)
    except JobError as error:
        if job.data.prepared is None:
            raise
        raise JobError(
            f"data.prepared({job.data.prepared}) is not in {data_folder(job)} any more, and it cannot be made again: "
            f"{error}"
        ) from None


def check_prepared(job: JobConfig, folder: Path) -> None:
    """Raise JobError if prepared data is damaged, as far as sizes tell, or was made for another vocabulary, or is too
    short for the job."""
    manifest = read_manifest(folder)
    if manifest.vocab != job.model.vocab:
        raise JobError(
            f"data: {folder} was made for a vocabulary of {manifest.vocab}, not model.vocab({job.model.vocab})"
        )
    check_length(job, manifest)


def needs_verifying(folder: Path) -> bool:
    """Whether a file of prepared data has changed since it was made or last verified. Raises JobError."""
    manifest = read_manifest(folder)
    try:
        return changed_since_checked(folder, manifest.files)
    except OSError as error:
        raise damaged(folder, f"{error.filename}: {error.strerror}") from None


def _check_inputs(job: JobConfig) -> None:
    check_vocabulary(job)
    if job.data.source == "shakespeare":
        choose_held_out(dict.fromkeys(shakespeare.WORKS, 1), _held_out_names(job.data))
        return
    documents = read_documents(source_files(job.data.source))
    held_out = held_out_works(documents, job.data)
    if job.data.tokenizer:
        train = (document.text for document in documents if document.work not in held_out)
        check_spelling(load_tokenizer(job.data.tokenizer), job.data.tokenizer, train)


def check_vocabulary(job: JobConfig) -> None:
    """Raise JobError if the tokenizer cannot be read, or does not go with `model.vocab`."""
    if job.data.tokenizer:
        check_tokenizer(load_tokenizer(job.data.tokenizer), job.data.tokenizer, job.model.vocab)
    elif job.model.vocab < SMALLEST_VOCAB:
        raise JobError(
            f"model.vocab({job.model.vocab}) is less than 256 bytes + 1 end-of-document token = {SMALLEST_VOCAB}, "
            "the smallest byte-level vocabulary"
        )


def check_length(job: JobConfig, manifest: Manifest) -> None:
    """Raise JobError if a side of the data is shorter than one sequence, or if the job makes absurdly many passes over
    it."""
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
        setting, amount = wanted[side]
        if amount > MOST_PASSES * tokens > 0:
            raise JobError(
                f"{setting} is {amount / tokens:.3g} times the {tokens} tokens of the data's {side} side: at most "
                f"{MOST_PASSES}"
            )
        if tokens < seq_len + 1:
            raise JobError(f"data: the {side} side has {tokens} tokens < model.seq_len({seq_len}) + 1 = {seq_len + 1}")


def held_out_works(documents: list[Document], data: DataConfig) -> set[str]:
    """The works to hold out. Raises JobError."""
    work_bytes: Counter[str] = Counter()
    for document in documents:
        work_bytes[document.work] += document.bytes
    return choose_held_out(work_bytes, _held_out_names(data))


def sources(data: DataConfig) -> list[Source]:
    """The files of a source with their hashes; for `shakespeare` the hash that the archive must have."""
    if data.source == "shakespeare":
        return [Source(name=shakespeare.ARCHIVE, sha256=shakespeare.SHA256)]
    return [Source(name=file.name, sha256=file_sha256(file)) for file in source_files(data.source)]


def _held_out_names(data: DataConfig) -> list[str]:
    if data.source == "shakespeare" and not data.held_out:
        return list(shakespeare.DEFAULT_HELD_OUT)
    return data.held_out
