"""The id under which a tracking service knows a run, so that a resumed run goes on there."""

import os
import secrets
from pathlib import Path


def remembered(path: Path) -> str | None:
    """The id in a file; None where there is none yet."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def remember(path: Path, identity: str) -> None:
    """Write it down, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(f"{identity}\n", encoding="utf-8")
    os.replace(temporary, path)


def fresh() -> str:
    """An id that no other run has."""
    return secrets.token_hex(8)
