"""The id under which a tracking service knows a run, so that a resumed run goes on there."""

import secrets
from pathlib import Path

from copus.durable import replace_text


def remembered(path: Path) -> str | None:
    """The id in a file; None if there is none yet."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def remember(path: Path, identity: str) -> None:
    """Write it down."""
    replace_text(path, f"{identity}\n")


def fresh() -> str:
    """An id that no other run has."""
    return secrets.token_hex(8)
