"""What the benchmarks' commands have in common: how they are called, and how they answer."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
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


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings over a job file, as `--set` and `load_job` take them: `training.seed=1`."""
    return [f"{name}={value}" for name, value in settings.items()]


def set_arguments(overrides: Iterable[str]) -> list[str]:
    """`--set` before each of them."""
    return [part for override in overrides for part in ("--set", override)]


def copus_output(*arguments: str) -> str:
    """Run the `copus` command of this repository; what it printed. Raises SystemExit with its errors if it failed."""
    command = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"copus {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout
