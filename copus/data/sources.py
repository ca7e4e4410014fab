"""Reads the user's own text: text files, JSON lines files and folders of them. A document knows its work."""

import functools
import hashlib
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from copus.job import JobError

TEXT_SUFFIXES = (".txt", ".md", ".text")
"""Text files that a folder is searched for. A text file that is named itself may be called anything else."""
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jl")
"""Files with one JSON object a line."""
JSON_SUFFIX = ".json"
"""Taken for JSON lines too. In a folder it is often something else: there the first line decides."""


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
        raise JobError("data.source: an empty list: name text files, JSON lines files or folders of them")
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
    files = sorted(file for file in path.rglob("*") if _is_text(file) and not _is_hidden(file.relative_to(path)))
    if not files:
        suffixes = ", ".join((*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES))
        raise JobError(f"data.source: no {suffixes} file in the folder {path}, and no {JSON_SUFFIX} file of JSON lines")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix == JSON_SUFFIX and file.is_file():
        return _begins_with_a_document(file)
    return suffix in (*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES) and file.is_file()


def _begins_with_a_document(file: Path) -> bool:
    """Whether the first line is a JSON object with `text`."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            value = json.loads(next((line for line in lines if line.strip()), ""))
    except OSError as error:
        raise JobError(f"data.source: {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "text" in value


def file_sha256(path: Path) -> str:
    """Hash of a file's content, read once in a process unless its size or time changes. Raises JobError."""
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

    A text file is one document, and its work is its name without suffix. So is each JSON line: an object with `text`
    and an optional `work`; without it the line is a work by itself, `file:line`. A document that is alone is cut in
    two, so that there is something to hold out. Raises JobError, naming file and line.
    """
    documents = [
        document
        for file in files
        for document in (_json_lines(file) if _is_json(file) else _text_file(file))
        if document.text.strip()
    ]
    if not documents:
        raise JobError(f"data.source: no text in {', '.join(map(str, files[:3]))}{' …' if len(files) > 3 else ''}")
    return _cut(documents[0]) if len(documents) == 1 else documents


def _cut(document: Document) -> list[Document]:
    """A beginning and an end of 5 to 10 %, cut between paragraphs, else lines, else words; whole if there is no such
    place."""
    text = document.text
    for separator in ("\n\n", "\n", " "):
        place = text.rfind(separator, round(0.9 * len(text)), round(0.95 * len(text)))
        beginning, end = text[:place], text[place:]
        if place > 0 and beginning.strip() and end.strip():
            parts = ("beginning", beginning), ("end", end)
            return [Document(document.name, f"{document.work} ({name})", part) for name, part in parts]
    return [document]


def _is_json(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix in (*JSON_LINES_SUFFIXES, JSON_SUFFIX):
        return True
    return suffix not in TEXT_SUFFIXES and _begins_with_a_document(file)


def _text_file(file: Path) -> Iterator[Document]:
    yield Document(name=file.name, work=file.stem, text=_read(file))


def _json_lines(file: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise JobError(f"data.source: {file}:{number}: not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise JobError(f'data.source: {file}:{number}: expected an object with a string "text" a line')
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
