"""`manifest.json` of prepared data: what the folder holds, where it came from, and the digest that names it."""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import field_serializer

from copus.job import JobError
from copus.manifest import MANIFEST, Entry, wrong_size
from profiles.record import NonNegativeInt, Record

FORMAT_VERSION = 2
"""Goes up whenever the same job would be prepared differently; a change to the table of Shakespeare's works counts."""

FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json")
"""What a prepared folder holds beside its manifest. Training adds `indices/`, the sample orders that it has used."""

Side = Literal["train", "valid"]


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
    """Every work, in the order of the data."""
    dropped: list[Dropped]
    """Documents that were kept out of training."""

    @field_serializer("files")
    def _by_name(self, files: dict[str, Entry]) -> dict[str, dict[str, int | str]]:
        return {name: entry._asdict() for name, entry in files.items()}

    @property
    def digest(self) -> str:
        """Identity of the data: a hash of the tokens of both sides, the tokenizer and the vocabulary, 16 hexadecimal
        digits. It does not depend on where the text lay or what its files were called."""
        content = {
            "files": {name: entry.blake2b for name, entry in self.files.items()},
            "vocab": self.vocab,
            "eod": self.eod,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return sum(entry.bytes for entry in self.files.values())

    def tokens(self, side: Side) -> int:
        """Tokens of one side."""
        return self.train_tokens if side == "train" else self.valid_tokens


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
    if manifest.digest != folder.name or manifest.files.keys() != set(FILES):
        raise damaged(folder, f"{MANIFEST} is that of other data ({manifest.digest})")
    if reason := wrong_size(folder, manifest.files):
        raise damaged(folder, reason)
    return manifest


def damaged(folder: Path, reason: str) -> JobError:
    """The error for a prepared folder that is not as it was made."""
    return JobError(f"data: {folder} is damaged: {reason}; remove the folder, and it is made again from data.source")
