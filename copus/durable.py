"""Writing so that it survives a loss of power (contents first, then the names), or so that nobody sees half of it; and
whether there is room for it."""

import os
import shutil
import tempfile
from pathlib import Path

FULL_BYTES = 16 * 2**20
"""A disk with less free space than this is taken for a full one: what could not be written is still there."""


def full_disk(folder: Path) -> str | None:
    """That the disk of a folder is full, in a few words; None if it is not, or cannot be asked."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return None
    return None if free > FULL_BYTES else f"the disk of {folder} is full, {free / 2**20:.1f} MiB are free"


def write_text(path: Path, text: str) -> None:
    """Write a file (UTF-8) and wait until its contents are on disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a file (UTF-8): readers see the old text or the new, never half of it. Does not wait for the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a file (UTF-8) whole or not at all, and wait until its contents are on disk."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write_text(temporary, text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
