"""Makes the prepared data of a job: reads, splits by work, drops leaks, trains the tokenizer, encodes, writes."""

import contextlib
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from copus.data import shakespeare
from copus.data.indexed import write_indexed
from copus.data.manifest import FILES, FORMAT_VERSION, Dropped, Manifest, Side, Work, damaged, read_manifest
from copus.data.overlap import HeldOutText
from copus.data.prepared import (
    check_length,
    check_prepared,
    check_vocabulary,
    data_folder,
    find_prepared,
    held_out_works,
    input_key,
    needs_verifying,
    remember,
    sources,
)
from copus.data.sources import Document, read_documents, source_files
from copus.data.tokenizer import check_spelling, check_tokenizer, encode, load_tokenizer, train_tokenizer
from copus.durable import sync_folder, write_text
from copus.job import JobConfig, JobError
from copus.manifest import MANIFEST, damage, describe, mark_checked

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is to do."""


def prepare(job: JobConfig, progress: Progress = lambda stage, done, total: None) -> Path:
    """The folder of a job's prepared data, made unless it is there, and verified if a file in it has changed.

    It is made beside its place and renamed once it is complete, so that nobody sees half of it, and two processes that
    prepare the same data at once are only wasteful. Raises JobError.
    """
    folder = find_prepared(job)
    if folder is None:
        return _make(job, progress)
    check_prepared(job, folder)
    if needs_verifying(folder):
        verify(folder, progress)
    return folder


def verify(folder: Path, progress: Progress = lambda stage, done, total: None) -> Manifest:
    """Compare the files of prepared data with the checksums in its manifest. Raises JobError where they differ."""
    manifest = read_manifest(folder)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("verifying, MiB", _mebibytes(done), _mebibytes(manifest.bytes))

    for name, entry in manifest.files.items():
        if reason := damage(folder, {name: entry}, advance):
            raise damaged(folder, reason)
    mark_checked(folder)
    return manifest


def _mebibytes(count: int) -> int:
    """Rounded up: little data is not none."""
    return -(-count >> 20)


def _make(job: JobConfig, progress: Progress) -> Path:
    check_vocabulary(job)
    parent = data_folder(job)
    temporary = parent / f".{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        key = input_key(job)
        manifest = _build(job, temporary, progress)
        if input_key(job) != key:
            raise JobError("data.source: the text changed while it was being prepared; start again when it is complete")
        _check_same(job, manifest)
        check_length(job, manifest)
        write_text(temporary / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        sync_folder(temporary)
        folder = parent / manifest.digest
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
            read_manifest(folder)  # another process was faster, or other inputs gave the same data
        sync_folder(parent)
        remember(job, key, manifest.digest)
    except OSError as error:
        raise JobError(f"data.cache: cannot write {error.filename or temporary}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # if the first data of a cache could not be made: they are empty
            parent.rmdir()
            job.data.cache.expanduser().rmdir()
    return folder


def _check_same(job: JobConfig, manifest: Manifest) -> None:
    """Raise JobError if the data of a run was made again, and is not what the run began with."""
    if job.data.prepared not in (None, manifest.digest):
        raise JobError(
            f"data.prepared({job.data.prepared}) is not in {data_folder(job)} any more, and data.source, "
            f"data.held_out and data.tokenizer now give other data ({manifest.digest}): put that folder or the old "
            "text back, or begin a new run"
        )


def _build(job: JobConfig, folder: Path, progress: Progress) -> Manifest:
    documents = _read(job, progress)
    held_out = held_out_works(documents, job.data)
    shared_text = shakespeare.SHARED_TEXT if job.data.source == "shakespeare" else ()
    kept, dropped = drop_leaks(documents, held_out, shared_text, progress)
    train = [document for document in kept if document.work not in held_out]
    valid = [document for document in kept if document.work in held_out]
    if not train:
        first = f"{dropped[0].document}: {dropped[0].reason}"
        raise JobError(f"data: all {len(dropped)} training documents repeat held-out text; {first}")

    tokenizer, eod = _tokenizer(job, train, progress)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False))

    tokens: Counter[str] = Counter()
    done, largest = 0, 0

    def encoded(side: list[Document]) -> Iterator[NDArray[np.int64]]:
        nonlocal done, largest
        for document in side:
            ids = encode(tokenizer, document.text, eod)
            largest = max(largest, int(ids.max()))
            if largest >= job.model.vocab:
                raise JobError(
                    f"data.tokenizer: {document.name} has the token id {largest}, and model.vocab is {job.model.vocab}"
                )
            tokens[document.work] += len(ids)
            done += 1
            progress("encoding", done, len(kept))
            yield ids

    write_indexed(folder / "train", encoded(train), job.model.vocab)
    write_indexed(folder / "valid", encoded(valid), job.model.vocab)
    works = _works(documents, kept, held_out, tokens)
    return Manifest(
        format_version=FORMAT_VERSION,
        files=describe(folder, FILES),
        sources=sources(job.data),
        vocab=job.model.vocab,
        eod=eod,
        largest_id=largest,
        train_tokens=sum(work.tokens for work in works if work.side == "train"),
        valid_tokens=sum(work.tokens for work in works if work.side == "valid"),
        works=works,
        dropped=dropped,
    )


def _read(job: JobConfig, progress: Progress) -> list[Document]:
    progress("reading", 0, 1)
    if job.data.source == "shakespeare":
        documents = shakespeare.read_documents(shakespeare.fetch(job.data.cache.expanduser()))
    else:
        documents = read_documents(source_files(job.data.source))
    progress("reading", 1, 1)
    return documents


def drop_leaks(
    documents: list[Document], held_out: set[str], shared_text: tuple[tuple[str, str], ...], progress: Progress
) -> tuple[list[Document], list[Dropped]]:
    """The documents without those of the training side whose text is held out; and those.

    `shared_text`: pairs of works that share text; they are not split over the two sides.
    """
    held_out_text = HeldOutText([document for document in documents if document.work in held_out])
    kept, dropped = [], []
    for number, document in enumerate(documents, start=1):
        reason = None
        if document.work not in held_out:
            reason = _shared_with(document.work, held_out, shared_text) or held_out_text.reason_to_drop(document)
        if reason:
            dropped.append(Dropped(document=document.name, work=document.work, reason=reason))
        else:
            kept.append(document)
        progress("comparing with held-out text", number, len(documents))
    return kept, dropped


def _shared_with(work: str, held_out: set[str], shared_text: tuple[tuple[str, str], ...]) -> str | None:
    for pair in shared_text:
        if work in pair and (others := held_out.intersection(pair)):
            return f"shares text with held-out {', '.join(others)}"
    return None


def _tokenizer(job: JobConfig, train: list[Document], progress: Progress) -> tuple["Tokenizer", int]:
    """The tokenizer and the id of its end-of-document token."""
    if job.data.tokenizer:
        tokenizer = load_tokenizer(job.data.tokenizer)
        eod = check_tokenizer(tokenizer, job.data.tokenizer, job.model.vocab)
        check_spelling(tokenizer, job.data.tokenizer, (document.text for document in train))
        return tokenizer, eod
    progress("training the tokenizer", 0, 1)
    tokenizer = train_tokenizer((document.text for document in train), job.model.vocab)
    progress("training the tokenizer", 1, 1)
    return tokenizer, 0


def _works(documents: list[Document], kept: list[Document], held_out: set[str], tokens: Counter[str]) -> list[Work]:
    count = Counter(document.work for document in kept)
    size: Counter[str] = Counter()
    for document in kept:
        size[document.work] += document.bytes
    sides: dict[str, Side] = {
        document.work: "valid" if document.work in held_out else "train" for document in documents
    }
    return [
        Work(name=work, side=side, documents=count[work], tokens=tokens[work], bytes=size[work])
        for work, side in sides.items()
    ]
