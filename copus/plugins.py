"""What other distributions add to copus: finding it by entry point, and importing it."""

import importlib
from importlib.metadata import entry_points
from typing import Any


def added(group: str) -> dict[str, tuple[str, str]]:
    """Name → (`module:attribute`, distribution with its version) of every entry point of a group, in order of names."""
    found = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown distribution"
        found[entry.name] = (entry.value, source)
    return found


def load(place: str) -> Any:
    """Import `module:attribute`. Raises ValueError, in one line, where that fails."""
    module, _, attribute = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:  # a stranger's module may raise anything
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return found
