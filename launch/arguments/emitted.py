"""Arguments of another tool that were made from a job, and what of the job they do not say."""

import json
import shlex
from dataclasses import dataclass, field


@dataclass
class Emitted:
    """Arguments in groups, each a line of what is printed."""

    groups: list[dict[str, list[str]]] = field(default_factory=list)
    """Name → values, none for a flag."""
    lost: list[str] = field(default_factory=list)
    """What the tool has no argument for, as sentences."""

    def group(self) -> None:
        """Begin a line."""
        self.groups.append({})

    def add(self, name: str, *values: object) -> None:
        """Add an argument to the line."""
        self.groups[-1][name] = [spelled(value) for value in values]

    def lose(self, sentence: str) -> None:
        """Report what cannot be said."""
        self.lost.append(sentence)

    @property
    def arguments(self) -> dict[str, list[str]]:
        """All arguments."""
        return {name: values for group in self.groups for name, values in group.items()}

    def command(self, start: str) -> str:
        """The command line, one group a line, for a shell."""
        lines = [
            " ".join(" ".join([name, *map(shlex.quote, values)]) for name, values in group.items())
            for group in self.groups
            if group
        ]
        return " \\\n  ".join([start, *lines]) + "\n"


def spelled(value: object) -> str:
    """A value as arguments have it: numbers without a needless point."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
    return json.dumps(value) if isinstance(value, list) else str(value)
