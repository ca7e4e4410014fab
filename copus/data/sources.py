"""Reads the user's own text: files, JSONL files and folders of them, each document with the work that it belongs to."""

import functools
import hashlib
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from copus.job import JobError

TEXT_SUFFIXES = (".txt", ".md", ".text")
"""What a folder is searched for, besides `.jsonl`. A file that is named itself may be called anything."""


@dataclass(frozen=True)
class Document:
    """A text that training sees from end to end."""

    name: str
    """Where it comes from: a file, or file:line."""
    work: str
    """What it is a part or an edition of. All documents of a work stand on the same side."""
    text: str
    """The text, never empty."""

    @property
    def bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode())


def source_files(paths: list[Path]) -> list[Path]:
    """The files that a source's paths name, in their order, those of a folder (and its subfolders) sorted, none twice.

    Raises JobError for what does not exist, for a folder without text and for a name that is not UTF-8.
    """
    if not paths:
        raise JobError("data.source: an empty list: name text files, JSONL files or folders of them")
    files: dict[Path, Path] = {}
    for path in (path.expanduser() for path in paths):
        for file in _files_of(path):
            if not _is_unicode(file.name):  # which names works
                raise JobError(f"data.source: {file}: the file's name is not UTF-8")
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.exists() and not path.is_dir():
        raise JobError(f"data.source: {path} is neither a regular file nor a folder")
    if not path.is_dir():
        raise JobError(f"data.source: no such file or folder: {path} (the only corpus with a name is `shakespeare`)")
    suffixes = (*TEXT_SUFFIXES, ".jsonl")
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise JobError(f"data.source: no {', '.join(suffixes)} file in the folder {path}")
    return found


def file_sha256(path: Path) -> str:
    """Hash of a file's content; read once in a process for as long as its size and time stay. Raises JobError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe has no end, and a device neither
            raise JobError(f"data: {path}: not a regular file")
        return _hash(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise JobError(f"data: {path}: {error.strerror}") from None


@functools.lru_cache(maxsize=65536)
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_documents(files: list[Path]) -> list[Document]:
    """Every document of the files, in order; blank ones are left out.

    A text file is one document, and its work is its name without suffix. A line of JSONL is one: `text`, and the
    optional `work`; without it the line is a work by itself, `file:line`. Raises JobError, naming file and line.
    """
    documents = [
        document
        for file in files
        for document in (_json_lines(file) if file.suffix.lower() == ".jsonl" else _text_file(file))
        if document.text.strip()
    ]
    if not documents:
        raise JobError(f"data.source: no text in {', '.join(map(str, files[:3]))}{' …' if len(files) > 3 else ''}")
    return documents


def _text_file(file: Path) -> Iterator[Document]:
    yield Document(name=file.name, work=file.stem, text=_read(file))


def _json_lines(file: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise JobError(f"data.source: {file}:{number}: not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise JobError(f'data.source: {file}:{number}: expected an object with a string "text"')
        work = value.get("work")
        if work is not None and not isinstance(work, str):
            raise JobError(f'data.source: {file}:{number}: "work" is not a string, got {work!r}')
        for key in ("text", "work"):
            if not _is_unicode(value.get(key) or ""):
                raise JobError(f'data.source: {file}:{number}: "{key}" has a lone surrogate, half of a character')
        name = f"{file.stem}:{number}"
        yield Document(name=name, work=work or name, text=value["text"])


def _is_unicode(text: str) -> bool:
    """False with lone surrogates: JSON can spell them, and so does Python for a file's name that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise JobError(f"data.source: {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"data.source: {file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
