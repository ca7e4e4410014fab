"""Makes the prepared data of a job, in a folder that nobody sees before it is complete."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from copus.data.indexed import IndexedDocuments, check_index, largest_id
from copus.data.manifest import FORMAT_VERSION, MOST_LISTED, Manifest, Part, Side, Slice, damaged, read_manifest
from copus.data.parts import PartSource, held_out_parts, training_parts
from copus.data.prepared import (
    check_length,
    check_prepared,
    check_vocabulary,
    data_folder,
    find_prepared,
    input_key,
    needs_verifying,
    remember,
    sources,
)
from copus.data.text_pipeline import Prepared, Progress, TextPipeline
from copus.data.tokenizer import check_tokenizer, load_tokenizer
from copus.durable import sync_folder, write_text
from copus.job import JobConfig, JobError
from copus.manifest import MANIFEST, damage, describe, mark_checked

DEFAULT_SHARE = 0.05
"""Share of the documents of an indexed dataset that is held out unless the job says more."""
_NOTE = "progress.json"


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
    """Compare the files of prepared data with the checksums in its manifest. Raises JobError if they differ."""
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
    try:
        parent.mkdir(parents=True, exist_ok=True)
        key = input_key(job)
        with _making(parent, key) as temporary:
            manifest = _build(job, temporary, progress)
            if input_key(job) != key:
                raise JobError(
                    "data.source: the text changed while it was being prepared; start again when it is complete"
                )
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
        raise JobError(f"data.cache: cannot write {error.filename or parent}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # if the first data of a cache could not be made: they are empty
            parent.rmdir()
            job.data.cache.expanduser().rmdir()
    return folder


@contextlib.contextmanager
def _making(parent: Path, key: str) -> Iterator[Path]:
    """The folder in which the data of some inputs is made.

    It is the one in which a preparation of the same inputs was killed or interrupted, if that noted its place. Another
    process that prepares the same data at the same time has a folder of its own. Whatever error there is, the folder
    is removed, except after an interrupt that can be gone on from.
    """
    folder, lock = parent / f".making-{key}", parent / f".lock-{key}"
    with open(lock, "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            folder = parent / f".{uuid.uuid4().hex}"
        try:
            if folder.is_dir() and not (folder / _NOTE).is_file():
                shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
            yield folder
        except (KeyboardInterrupt, SystemExit):
            if not (folder / _NOTE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            if not (folder / _NOTE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)


def _check_same(job: JobConfig, manifest: Manifest) -> None:
    """Raise JobError if the data of a run was made again, and is not what the run began with."""
    if job.data.prepared not in (None, manifest.digest):
        raise JobError(
            f"data.prepared({job.data.prepared}) is not in {data_folder(job)} any more, and data.source, "
            f"data.held_out and data.tokenizer now give other data ({manifest.digest}): put that folder or the old "
            "text back, or begin a new run"
        )


def _build(job: JobConfig, folder: Path, progress: Progress) -> Manifest:
    train, held_out = training_parts(job.data), held_out_parts(job.data)
    parts: list[Part] = []
    largest = 0
    text = [part for part in (*train, *held_out) if part.has_text]
    prepared = None
    if text:
        by_source = [part in held_out for part in text]
        pipeline = TextPipeline(job, text, folder, progress)
        prepared = pipeline.run(by_source if held_out else [False] * len(text))
        largest = prepared.largest
        parts += _text_parts(prepared, text, by_source)
    for number, part in enumerate(part for part in (*train, *held_out) if not part.has_text):
        largest = max(largest, _link(part, folder, f"data-{number}", job.model.vocab, progress))
        parts += _prefix_parts(job, part, folder, f"data-{number}", held_out, is_held_out=part in held_out)
    eod = prepared.eod if prepared else _eod_of_tokenizer(job, folder)
    tokens = {side: sum(part.slice.tokens for part in parts if part.side == side) for side in get_args(Side)}
    if {part.slice.prefix for part in parts} == set(get_args(Side)) and not any(part.slice.mask for part in parts):
        parts = []  # one dataset on each side, which have the names of the sides: there is nothing to blend
    if prepared:
        prepared.remove_empty()
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return Manifest(
        format_version=FORMAT_VERSION,
        files=describe(folder, names),
        sources=sources(job.data)[:MOST_LISTED],
        vocab=job.model.vocab,
        eod=eod,
        largest_id=largest,
        train_tokens=tokens["train"],
        valid_tokens=tokens["valid"],
        works=prepared.works if prepared else [],
        dropped=prepared.dropped if prepared else [],
        work_count=prepared.work_count if prepared else 0,
        dropped_count=prepared.dropped_count if prepared else 0,
        parts=parts,
    )


def _text_parts(prepared: Prepared, text: list[PartSource], by_source: list[bool]) -> list[Part]:
    """The datasets that the text has become. On the training side a weight is that of the job, or the number of tokens;
    on the held-out side it is the same if the part has both sides."""
    parts = []
    for number, (part, held_out) in enumerate(zip(text, by_source, strict=True)):
        for side in get_args(Side):
            dataset = prepared.slice(number, side)
            if dataset is not None:
                weight = dataset.tokens if part.weight is None or held_out else part.weight
                parts.append(Part(name=part.name, weight=weight, side=side, slice=dataset))
            elif side == "train" and not held_out:
                raise JobError(f"data.source: {part.name}: all of its documents repeat held-out text")
    return parts


def _link(part: PartSource, folder: Path, name: str, vocab: int, progress: Progress) -> int:
    """Put links to the files of an indexed dataset into the folder. Returns its largest id. Raises JobError if it is
    broken, or has an id that is no token of the vocabulary."""
    assert part.prefix is not None
    check_index(part.prefix)
    files = [part.prefix.with_name(part.prefix.name + suffix).absolute() for suffix in (".bin", ".idx")]
    size, done = files[0].stat().st_size, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(f"checking {part.name}, MiB", _mebibytes(done), _mebibytes(size))

    largest = largest_id(part.prefix, vocab, advance)
    for file in files:
        link = folder / f"{name}{file.suffix}"
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    return largest


def _prefix_parts(
    job: JobConfig, part: PartSource, folder: Path, name: str, held_out: list[PartSource], *, is_held_out: bool
) -> list[Part]:
    """The datasets of an indexed dataset: its last documents are held out, unless other sources are. Raises JobError if
    one of the sides would be empty."""
    documents = IndexedDocuments(folder / name)
    total, share = len(documents), job.data.held_out_share or DEFAULT_SHARE
    if held_out:
        spans: dict[Side, tuple[int, int]] = {"valid" if is_held_out else "train": (0, total)}
    else:
        kept = total - max(1, round(share * total))
        if kept < 1:
            raise JobError(
                f"data.source: {part.name} has {total} documents: none is left to train on if {share:g} of them are "
                "held out; name others in data.held_out_source"
            )
        spans = {"train": (0, kept), "valid": (kept, total)}
    parts = []
    for side, (first, last) in spans.items():
        tokens = int(documents.lengths[first:last].sum(dtype="int64"))
        weight = tokens if part.weight is None or is_held_out else part.weight
        dataset = Slice(prefix=name, first=first, documents=last - first, tokens=tokens)
        parts.append(Part(name=part.name, weight=weight, side=side, slice=dataset))
    return parts


def _eod_of_tokenizer(job: JobConfig, folder: Path) -> int:
    """Id of the token that ends a document, and the tokenizer's copy in the folder, for data without text. −1 if no
    tokenizer is named."""
    path = job.data.tokenizer
    if path is None:
        return -1
    tokenizer = load_tokenizer(path)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    return check_tokenizer(tokenizer, path, job.model.vocab, job.data.eos_token)
