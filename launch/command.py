"""What every subcommand of `copus` shares: the layout of its help, and its usual arguments, which the shell completes.

Imports nothing heavy: `copus --help` and Tab answer at once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from launch.run_names import run_names

SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


class Command(click.Command):
    """A subcommand with examples below its help, and a section in the help of its group."""

    def __init__(self, name: str, examples: Sequence[str] = (), section: str = "Commands", **settings: Any) -> None:
        super().__init__(name, context_settings=SETTINGS, **settings)
        self.examples = tuple(examples)
        self.section = section

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one on each line. They are not wrapped: they are there to be pasted."""
        if self.examples:
            with formatter.section("Examples" if len(self.examples) > 1 else "Example"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


class CommandGroup(Command, click.Group):
    """Subcommands below their sections, in the order in which they were defined."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were defined."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A line for each command, below the heading of its section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            rows = sections.setdefault(getattr(command, "section", "Commands"), [])
            rows.append((name, command.get_short_help_str(100)))
        width = max(map(len, self.commands))
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows])


def complete_run(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of runs that begin so; folders once a path is being typed."""
    if "/" in incomplete or incomplete.startswith(("~", ".")):
        return [CompletionItem(incomplete, type="dir")]
    names = [name for name in run_names() if name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="dir")]


def complete_job_or_run(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of runs that begin so, and files."""
    names = [name for name in run_names() if name.startswith(incomplete)]
    return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


RUN_HELP = "Run directory, or its name below $COPUS_RUNS or ./runs"
Decorator = Callable[[Callable[..., int]], Callable[..., int]]
FILE = click.Path(path_type=Path)


def run_argument(more: str = "") -> Decorator:
    """The run that a command needs; `more` ends the sentence that explains it."""
    return click.argument("run", metavar="RUN", shell_complete=complete_run, help=f"{RUN_HELP}{more}.")


newest_run_argument = click.argument(
    "run",
    metavar="[RUN]",
    required=False,
    shell_complete=complete_run,
    help=f"{RUN_HELP}. Without it the newest run there.",
)
job_argument = click.argument("job", metavar="JOB.yaml", type=FILE, help="Job file.")


attended_engine_option = click.option(
    "--engine",
    metavar="ENGINE",
    help="Measure with this engine instead of launch.engine: local; srun, in a Slurm allocation (salloc, a batch "
    "script); or one that a plugin adds, if it has no queue. launch.options is left out.",
)


def set_option(text: str = "Override a field of the job file.") -> Decorator:
    """`--set`, which may be repeated."""
    return click.option("--set", "overrides", metavar="SECTION.FIELD=VALUE", multiple=True, help=f"{text} Repeatable.")


def json_option(text: str = "Print one JSON object.") -> Decorator:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help=text)


PROGRESS_JSON = "Print the result as one JSON object on stdout, and the progress on stderr."
