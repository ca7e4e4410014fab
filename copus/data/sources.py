"""Which files a source names, how they are to be read, and what identifies their content."""

import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from copus.job import JobError

TEXT_SUFFIXES = (".txt", ".md", ".text")
"""Text files that a folder is searched for. A text file that is named itself may be called anything else."""
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jl")
"""Files with one JSON object a line."""
JSON_SUFFIX = ".json"
"""Taken for JSON lines too. In a folder it is often something else: there the first line decides."""
PARQUET_SUFFIX = ".parquet"
ARROW_SUFFIX = ".arrow"
COMPRESSED_SUFFIXES = (".gz", ".zst")
"""After the suffix of a text file or a JSON lines file."""
DATASET_STATE = "state.json"
"""In the folder of a dataset that Hugging Face's `datasets` has saved to disk: the names of its Arrow files."""
DATASET_SPLITS = "dataset_dict.json"
"""In a folder of several of them."""
_LONGEST_FIRST_LINE = 64 << 20
HASHED_BYTES = 64 << 20
"""Larger files are known by their size and the time of their last change, not by a hash of their content: to hash them
would take longer than anything else that a command does before it starts."""


def source_files(paths: list[Path]) -> list[Path]:
    """The files that a source's paths name, in their order, those of a folder (and its subfolders) sorted, none twice.

    Raises JobError for what does not exist, for a folder without text and for a name that is not UTF-8.
    """
    if not paths:
        raise JobError("data.source: an empty list: name text files, JSON lines files or folders of them")
    files: dict[Path, Path] = {}
    for path in (path.expanduser() for path in paths):
        for file in _files_of(path):
            if not is_unicode(file.name):  # which names works
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
    if (path / DATASET_STATE).is_file():
        return _dataset_files(path)
    if (path / DATASET_SPLITS).is_file():
        raise JobError(f"data.source: {path} holds several splits of a dataset: name the folder of one, {path}/train")
    files = sorted(file for file in _files_below(path) if _is_text(file))
    if not files:
        suffixes = ", ".join((*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES))
        raise JobError(f"data.source: no {suffixes} file in the folder {path}, and no {JSON_SUFFIX} file of JSON lines")
    return files


def _dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset that `datasets` has saved to disk, in its order."""
    state = folder / DATASET_STATE
    try:
        values = json.loads(state.read_bytes())
        files = [folder / str(entry["filename"]) for entry in values["_data_files"]]
    except OSError as error:
        raise JobError(f"data.source: {state}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise JobError(f"data.source: {state} does not name the files of a dataset") from None
    if values.get("_indices_files"):
        raise JobError(f"data.source: {folder} is a selection of a dataset: save it with `flatten_indices()`")
    for file in files:
        if file.parent != folder or not file.is_file():
            raise JobError(f"data.source: {folder} is not complete: {file.name} is missing")
    return files


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders, also of those that are links, without those that are hidden. Raises
    JobError for a subfolder that cannot be listed, or that is gone meanwhile: its text would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise JobError(f"data.source: {error.filename}: {error.strerror}") from None

    visited: set[str] = set()
    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (target := os.path.realpath(place)) in visited:  # links may lead in a circle
            subfolders.clear()
            continue
        visited.add(target)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _is_text(file: Path) -> bool:
    """Whether a file of a folder is read. Raises JobError if that would be, were it there."""
    is_json = file.suffix.lower() == JSON_SUFFIX
    if not is_json and _inner_suffix(file) not in (*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES, PARQUET_SUFFIX):
        return False
    if not file.exists():
        raise JobError(f"data.source: {file} is gone, or a link to nothing")
    return file.is_file() and (not is_json or _begins_with_a_document(file))


def _begins_with_a_document(file: Path) -> bool:
    """Whether the first line is a JSON object with `text`."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            line = lines.readline(_LONGEST_FIRST_LINE)
            while line and not line.strip():
                line = lines.readline(_LONGEST_FIRST_LINE)
            value = json.loads(line)
    except OSError as error:
        raise JobError(f"data.source: {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "text" in value


def file_identity(path: Path) -> dict[str, str | int]:
    """What tells the content of a file: its SHA-256, or of a large one size and time of its last change. Raises
    JobError."""
    try:
        status = path.stat()
    except OSError as error:
        raise JobError(f"data: {path}: {error.strerror}") from None
    if status.st_size <= HASHED_BYTES:
        return {"sha256": file_sha256(path)}
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


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


def kind_of(file: Path) -> str:
    """How a file is read: `text`, `json` (lines), `parquet` or `arrow`."""
    suffix = _inner_suffix(file)
    if suffix == PARQUET_SUFFIX:
        return "parquet"
    if suffix == ARROW_SUFFIX:
        return "arrow"
    if suffix in (*JSON_LINES_SUFFIXES, JSON_SUFFIX):
        return "json"
    return "json" if suffix not in TEXT_SUFFIXES and _begins_with_a_document(file) else "text"


def stem_of(file: Path) -> str:
    """The name of a file without its suffixes: `plays` of `plays.jsonl.gz`."""
    return Path(file.stem).stem if file.suffix.lower() in COMPRESSED_SUFFIXES else file.stem


def _inner_suffix(file: Path) -> str:
    """The suffix that says what a file is, lower case: `.jsonl` of `plays.jsonl.gz`."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def is_unicode(text: str) -> bool:
    """False with lone surrogates: JSON can spell them, and so does Python for a file's name that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
