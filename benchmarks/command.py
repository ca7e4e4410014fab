"""What the benchmarks' commands have in common: how they are called, and how they answer."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

from launch.tables import page


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """For `python -m benchmarks.NAME`, described by the first line of its docstring, with `--json`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def console_of(options: argparse.Namespace, width: int | None = None) -> Console:
    """Where people are told; standard output belongs to the JSON object."""
    console = page(stderr=options.json)
    if width is not None:
        console.width = width
    return console


def tell(
    result: dict[str, Any],
    show: Callable[[dict[str, Any], Console], None],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Show the result to people, and print it for programs where they asked."""
    show(result, console)
    if options.json:
        print(json.dumps(result, indent=2))
