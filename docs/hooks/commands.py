"""The reference of the `copus` command, from the definitions of its commands."""

from collections.abc import Iterator

import click

from launch.cli import copus


def commands(group: click.Group = copus, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its name: `submit`, `profile`, `profile run`, …"""
    for name, command in group.commands.items():
        full = f"{before} {name}".strip()
        yield full, command
        if isinstance(command, click.Group):
            yield from commands(command, full)


def flags(name: str) -> set[str]:
    """Every option of a command that begins with `--`."""
    command = dict(commands())[name]
    return {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}


def page() -> str:
    """Every command as a heading with its usage, a table of its arguments, and its examples."""
    parts = []
    for name, command in commands():
        context = click.Context(command, info_name=f"copus {name}")
        usage = " ".join([f"copus {name}", *command.collect_usage_pieces(context)])
        paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
        parts += [f"### `copus {name}`", *map(_escaped, paragraphs), f"```\n{usage}\n```"]
        rows = [f"| {_code(call)} | {_escaped(text)} |" for call, text in _arguments(command, context)]
        if rows:
            parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
        if examples := getattr(command, "examples", ()):
            parts.append("\n".join(["```", *examples, "```"]))
    return "\n\n".join(parts)


def _arguments(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """`--flag VALUE` or `POSITIONAL`, and its explanation."""
    for parameter in command.params:
        if record := parameter.get_help_record(context):
            yield record


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text of Markdown, in which code stays code."""
    pieces = text.split("`")
    for place in range(0, len(pieces), 2):
        for sign in "|<*_[]":
            pieces[place] = pieces[place].replace(sign, f"\\{sign}")
    return "`".join(pieces)
