"""Checksums of the files in a folder, written last: what they vouch for is what was meant to be there.

Checkpoints and sample orders have them as `manifest.json`; that of prepared data says more (copus/data/manifest.py).

They tell accidents (a torn write, a flipped bit, a file cut short), not malice: nothing here is secret.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from copus.durable import sync_folder, write_text

MANIFEST = "manifest.json"
"""Name of the file, beside those that it lists."""
_VERSION = 1
_THREADS = 8
_CHUNK_BYTES = 1 << 20


class Entry(NamedTuple):
    """What one file has to be."""

    bytes: int
    """Its size."""
    blake2b: str
    """BLAKE2b-256 of its content, hexadecimal."""


def files_of(folder: Path) -> list[str]:
    """Paths of the files below a folder, relative to it, without the manifest; sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def describe(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Flush files to disk and take their checksums, several at a time. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:  # hashing and reading let go of the interpreter
        return dict(zip(names, threads.map(lambda name: _flushed(folder / name), names), strict=True))


def write_manifest(folder: Path, entries: dict[str, Entry]) -> None:
    """Write the manifest durably, and flush every folder that has files. Raises OSError."""
    values = {"version": _VERSION, "files": {name: entry._asdict() for name, entry in sorted(entries.items())}}
    write_text(folder / MANIFEST, json.dumps(values, indent=1))
    for below in {folder, *((folder / name).parent for name in entries)}:
        sync_folder(below)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What the files have to be. Raises ValueError, with the reason, if there is no manifest that can be read."""
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
        if values["version"] != _VERSION:
            raise ValueError(f"version {values['version']!r} is not {_VERSION}")
        return {name: Entry(int(file["bytes"]), str(file["blake2b"])) for name, file in values["files"].items()}
    except FileNotFoundError:
        raise ValueError(f"half-written: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from None


def wrong_size(folder: Path, expected: dict[str, Entry]) -> str | None:
    """The first file that is missing or of another size, in a few words; None if there is none. Reads no content."""
    for name, entry in expected.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if size != entry.bytes:
            return f"{name} has {size} bytes instead of {entry.bytes}"
    return None


def changed_since_checked(folder: Path, expected: dict[str, Entry]) -> bool:
    """Whether any file was written to, replaced or copied after the manifest was written or `mark_checked`.

    Goes by the time of the inode's last change, which nobody sets back by accident. Then the checksums have to be
    compared again; as long as nothing changed there is no need to read the files.
    """
    checked = (folder / MANIFEST).stat().st_ctime_ns
    return any((folder / name).stat().st_ctime_ns >= checked for name in expected)


def mark_checked(folder: Path) -> None:
    """Note that the checksums agree. Where the folder cannot be written to, the next reader has to compare again."""
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)


def damage(folder: Path, expected: dict[str, Entry], advance: Callable[[int], None] = lambda count: None) -> str | None:
    """What is wrong with the files, in a few words; None if all of them are as expected.

    `advance` is called with the number of bytes that were read since the last call, from several threads.
    """
    if reason := wrong_size(folder, expected):
        return reason
    with ThreadPoolExecutor(_THREADS) as threads:
        reasons = threads.map(lambda item: _difference(folder, item[0], item[1], advance), expected.items())
        return next((reason for reason in reasons if reason), None)


def _difference(folder: Path, name: str, entry: Entry, advance: Callable[[int], None]) -> str | None:
    try:
        with open(folder / name, "rb") as file:
            digest = _digest(file, advance)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if digest == entry.blake2b else f"{name} has changed since it was written (checksum)"


def _flushed(path: Path) -> Entry:
    with open(path, "rb") as file:
        entry = Entry(os.fstat(file.fileno()).st_size, _digest(file))
        os.fsync(file.fileno())
    return entry


def _digest(file: BinaryIO, advance: Callable[[int], None] = lambda count: None) -> str:
    digest, buffer = hashlib.blake2b(digest_size=32), memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        advance(count)
    return digest.hexdigest()
