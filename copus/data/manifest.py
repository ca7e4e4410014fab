"""`manifest.json` of prepared data: what the folder holds, where it came from, and the digest that names it."""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import Field, field_serializer

from copus.job import JobError
from copus.manifest import MANIFEST, Entry, wrong_size
from profiles.record import NonNegativeInt, Record

FORMAT_VERSION = 3
"""Goes up whenever the same job would be prepared differently; a change to the table of Shakespeare's works counts."""

FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json")
"""What the folder of a text holds beside its manifest. Training adds `indices/`, the sample orders that it has used."""
MOST_LISTED = 1000
"""Works, files and dropped documents that a manifest lists; of more it has the number."""

Side = Literal["train", "valid"]


class Source(Record):
    """A file that was read."""

    name: str
    """Its name, without folders."""
    sha256: str | None = None
    """Hash of its content; None of a large file, which is known by what follows."""
    bytes: NonNegativeInt | None = None
    """Its size."""
    modified_ns: int | None = None
    """Time of its last change, in nanoseconds since 1970."""


class Slice(Record):
    """Consecutive documents of an indexed dataset in the folder."""

    prefix: str
    """Its files without suffix, `train` for `train.bin` and `train.idx`."""
    first: NonNegativeInt
    """Number of the first document."""
    documents: NonNegativeInt | None = None
    """How many there are; None for all."""
    tokens: NonNegativeInt
    """Their tokens."""
    mask: bool = False
    """Whether `<prefix>.mask` has a byte for each token, 0 for those that are not learned."""


class Part(Record):
    """A dataset of a blend."""

    name: str
    """The entry of `data.source` or `data.held_out_source`."""
    weight: float
    """Weight in the blend of its side."""
    side: Side
    """Its side."""
    slice: Slice
    """Its documents."""


class Work(Record):
    """What became of a work."""

    name: str
    """Its name."""
    side: Side
    """Whether it is trained on or held out."""
    documents: int
    """Its documents in the data; dropped ones do not count."""
    tokens: int
    """Their tokens, end-of-document tokens included."""
    bytes: int
    """Their length in UTF-8."""


class Dropped(Record):
    """A document that is not trained on because its text is held out."""

    document: str
    """Its name."""
    work: str
    """Its work."""
    reason: str
    """The held-out document that it overlaps with, and by how much."""


class Manifest(Record):
    """What a prepared folder holds."""

    format_version: int
    """Version of this format."""
    files: dict[str, Entry]
    """Size and checksum of every other file."""
    sources: list[Source]
    """The files that were read."""
    vocab: int
    """The vocabulary that the data was made for."""
    eod: int
    """Id of the token that ends a document."""
    largest_id: NonNegativeInt
    """Largest token id in the data, smaller than `vocab`: every id was looked at when the data was made."""
    train_tokens: int
    """Tokens to train on."""
    valid_tokens: int
    """Tokens held out."""
    works: list[Work]
    """Every work, in the order of the data; the first thousand."""
    dropped: list[Dropped]
    """Documents that were kept out of training; the first thousand."""
    work_count: NonNegativeInt = 0
    """Works, where there are more than are listed; a work may be counted more than once."""
    dropped_count: NonNegativeInt = 0
    """Documents that were kept out of training, where there are more than are listed."""
    parts: list[Part] = Field(default_factory=list)
    """The datasets of both sides. None: all of `train` and all of `valid`."""

    @field_serializer("files")
    def _by_name(self, files: dict[str, Entry]) -> dict[str, dict[str, int | str]]:
        return {name: entry._asdict() for name, entry in files.items()}

    @property
    def digest(self) -> str:
        """Identity of the data: a hash of the tokens of both sides, the tokenizer and the vocabulary, 16 hexadecimal
        digits. It does not depend on where the text lay or what its files were called."""
        content: dict[str, object] = {
            "files": {name: entry.blake2b for name, entry in self.files.items()},
            "vocab": self.vocab,
            "eod": self.eod,
        }
        if self.parts:
            content["parts"] = [part.model_dump(exclude={"name"}) for part in self.parts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def has_its_files(self) -> bool:
        """Whether the files of all datasets are listed."""
        if not self.parts:
            return self.files.keys() == set(FILES)
        datasets = {part.slice.prefix for part in self.parts}
        return {f"{prefix}{suffix}" for prefix in datasets for suffix in (".bin", ".idx")} <= self.files.keys()

    def tokens(self, side: Side) -> int:
        """Tokens of one side."""
        return self.train_tokens if side == "train" else self.valid_tokens

    def slices(self, side: Side) -> list[tuple[Slice, float]]:
        """The datasets of one side and their weights."""
        if self.parts:
            return [(part.slice, part.weight) for part in self.parts if part.side == side]
        return [(Slice(prefix=side, first=0, tokens=self.tokens(side)), 1.0)]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder, when the folder has the name and its files have the sizes that it says.

    Cheap: no content is read. Raises JobError.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise damaged(folder, f"{MANIFEST} cannot be read: {error.strerror}") from None
    except ValueError:
        raise damaged(folder, f"{MANIFEST} was not written by this version") from None
    if manifest.digest != folder.name or not manifest.has_its_files:
        raise damaged(folder, f"{MANIFEST} is that of other data ({manifest.digest})")
    if reason := wrong_size(folder, manifest.files):
        raise damaged(folder, reason)
    return manifest


def damaged(folder: Path, reason: str) -> JobError:
    """The error for a prepared folder that is not as it was made."""
    return JobError(f"data: {folder} is damaged: {reason}; remove the folder, and it is made again from data.source")
