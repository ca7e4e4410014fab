"""Writing so that it survives a loss of power: contents first, then the names."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file (UTF-8) and wait until its contents are on disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
