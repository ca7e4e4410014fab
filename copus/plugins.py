"""What other distributions add, by entry point, to what is built in."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plugin:
    """Something that a job file can name."""

    name: str
    """Its name in the job file."""
    place: str
    """`module:attribute`."""
    source: str
    """`built in`, or the distribution that has it, with its version."""

    def load(self) -> Any:
        """Import it. Raises ValueError, in one line, if that fails."""
        module, _, attribute = self.place.partition(":")
        try:
            part: Any = importlib.import_module(module)
            for name in attribute.split("."):
                part = getattr(part, name)
        except Exception as error:  # a stranger's module may raise anything
            raise ValueError(f"{self.name} ({self.source}): {type(error).__name__}: {error}") from error
        return part


def plugins(group: str, built_in: Mapping[str, str]) -> dict[str, Plugin]:
    """All of a kind by name, the built-in ones (name → place) first; a plugin cannot take the name of one of these.

    Built-in ones are no entry points, because a checkout that is not installed has none.
    """
    from importlib.metadata import entry_points

    by_name = {name: Plugin(name, place, "built in") for name, place in built_in.items()}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown distribution"
        by_name.setdefault(entry.name, Plugin(entry.name, entry.value, source))
    return by_name


def find_plugin(kind: str, name: str, group: str, built_in: Mapping[str, str]) -> Plugin:
    """The one of that name; only where none is built in, the disk is searched. Raises ValueError that lists all.

    `kind` is the word for it: `profiler`, `engine`.
    """
    if name in built_in:
        return Plugin(name, built_in[name], "built in")
    by_name = plugins(group, built_in)
    if name not in by_name:
        listed = ", ".join(f"{plugin.name} ({plugin.source})" for plugin in by_name.values())
        raise ValueError(f"no {kind} {name!r} is installed; there are {listed}")
    return by_name[name]
