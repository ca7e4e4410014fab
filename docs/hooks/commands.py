"""The reference of the `copus` command, from what `--help` prints."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

from launch import cli


@dataclass(frozen=True)
class Help:
    """What `copus NAME --help` says."""

    usage: str
    """How it is called."""
    text: str
    """What it does."""
    arguments: tuple[tuple[str, str], ...]
    """`--flag VALUE` or `POSITIONAL`, and its explanation; without --help."""

    @property
    def flags(self) -> set[str]:
        """Everything that begins with `--`."""
        return {flag for call, _ in self.arguments for flag in re.findall(r"--[a-z][a-z-]*", call)}


def names(union: Any = cli.Commands, before: str = "") -> Iterator[str]:
    """Every command: `submit`, `profile`, `profile run`, …"""
    for each in get_args(union):
        command, (subcommand, *_) = get_args(each)[0], each.__metadata__
        name = f"{before} {subcommand.name}".strip()
        yield name
        for field in fields(command):
            inner = get_type_hints(command, include_extras=True)[field.name]
            if all(hasattr(option, "__metadata__") for option in get_args(inner) or [None]):
                yield from names(inner, name)


@cache
def help_of(name: str) -> Help:
    """Ask the command itself, on lines so wide that nothing is broken."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with patch.dict(os.environ, COLUMNS="2000"), redirect_stdout(printed), suppress(SystemExit):
        cli.main([*name.split(), "--help"])
    printed.seek(0)
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed.read())
    usage, _, rest = text.partition("\n\n")
    told = rest.partition("╭")[0]
    arguments: list[tuple[str, str]] = []
    for line in (line.removeprefix("│ ").rstrip("│ ") for line in text.splitlines() if line.startswith("│ ")):
        if line.startswith(" "):  # the explanation of a long argument has a line of its own
            call, more = arguments.pop()
            arguments.append((call, f"{more} {line.strip()}".strip()))
        else:
            call, _, more = line.partition("  ")
            arguments.append((call, more.strip()))
    return Help(
        usage=usage.removeprefix("usage: ").strip(),
        text=told.strip(),
        arguments=() if "{" in usage else tuple(each for each in arguments if not each[0].startswith("-h,")),
    )


def page() -> str:
    """Every command as a heading with its usage, and a table of its arguments."""
    parts = []
    for name in names():
        said = help_of(name)
        parts += [f"### `copus {name}`", said.text, f"```\n{said.usage}\n```"]
        if said.arguments:
            rows = [f"| {_code(call)} | {_escaped(text)} |" for call, text in said.arguments]
            parts.append("\n".join(["| argument | is |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _escaped(text: str) -> str:
    for sign in "|<*_[]":
        text = text.replace(sign, f"\\{sign}")
    return text
