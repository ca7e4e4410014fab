"""The `copus` command: what can be typed, and its help. What each command does is in the file of its name.

Nothing heavy is imported here: `copus --help` is for people, and answers at once.
"""

import difflib
import os
import sys
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, Protocol, get_args

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction, arg, subcommand

JobFile = Annotated[Path, arg(metavar="JOB.yaml")]
OptionalJobFile = Annotated[Path | None, arg(metavar="[JOB.yaml]", help_behavior_hint="")]
Run = Annotated[str, arg(metavar="RUN", name="run")]
OptionalRun = Annotated[str | None, arg(metavar="[RUN]", name="run", help_behavior_hint="")]
Overrides = Annotated[list[str], UseAppendAction, arg(name="set", metavar="SECTION.FIELD=VALUE")]


class Command(Protocol):
    """A subcommand with its arguments."""

    def run(self) -> int:
        """Do it. Returns the exit code."""


@dataclass
class Submit:
    """Train a job; it moves to a better batch and layout while it runs. Ctrl-C stops it with a checkpoint.

    On an engine with a queue (slurm, kubernetes) Ctrl-C only leaves it alone; `copus cancel RUN` stops it there.
    Examples: copus submit examples/shakespeare.yaml --set training.seed=7 · copus submit --resume shakespeare
    """

    job: Positional[OptionalJobFile] = None
    """Job file. With --resume: settings to go on with, instead of the run's own."""
    overrides: Overrides = field(default_factory=list)
    """Override a field of the job file."""
    name: Annotated[str | None, arg(metavar="NAME")] = None
    """Name of the run; short for --set name=NAME."""
    resume: Annotated[str | None, arg(metavar="RUN")] = None
    """Go on with this run (a path, or a name below ./runs), exactly where it was."""
    allow_from_scratch: bool = False
    """With --resume: train again from the first step if no checkpoint verifies, instead of refusing."""
    engine: Annotated[str | None, arg(metavar="ENGINE")] = None
    """Where to run, not launch.engine: local, slurm, kubernetes, or a plugin's; leaves out launch.options."""
    dry_run: bool = False
    """Print what would be done (a command, a script, a manifest) and do nothing."""
    detach: bool = False
    """Return as soon as the job is queued. For engines with a queue."""
    json: bool = False
    """Print the result as one JSON object on stdout, and the progress on stderr."""

    def run(self) -> int:
        from launch.submit import Manner, submit

        manner = Manner(self.engine, self.dry_run, self.allow_from_scratch, self.detach, self.json)
        named = [] if self.name is None else [f"name={self.name}"]
        return submit(self.job, [*self.overrides, *named], self.resume, manner)


@dataclass
class Logs:
    """Print what the workers of a run wrote, and go on printing with --follow until it has ended.

    Example: copus logs shakespeare --follow --rank 0
    """

    run_name: Positional[OptionalRun] = None
    """Run directory, or its name below ./runs; the newest run there if it is not given."""
    rank: Annotated[int | None, arg(metavar="N")] = None
    """Only the lines of this rank; without it those of all ranks, and of what starts them."""
    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Wait for more lines until the run has ended."""

    def run(self) -> int:
        from launch.logs import logs

        return logs(self.run_name, self.rank, follow=self.follow)


@dataclass
class Cancel:
    """Stop a run for good: at the next step, with a checkpoint, or at once. `copus submit --resume RUN` goes on.

    Example: copus cancel shakespeare
    """

    run_name: Positional[Run]
    """Run directory, or its name below ./runs."""
    now: bool = False
    """End the workers at once, without a checkpoint."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        from launch.cancel import cancel

        return cancel(self.run_name, now=self.now, as_json=self.json)


@dataclass
class Explain:
    """Show a decision of the planner: every candidate, the choice, the reason, and predicted against seen.

    Example: copus explain shakespeare --decision 3
    """

    run_name: Positional[OptionalRun] = None
    """Run directory, or its name below ./runs; the newest run there if it is not given."""
    decision: Annotated[int | None, arg(metavar="N")] = None
    """Number of the decision; without it the newest that moved the job, else the newest."""
    all: bool = False
    """Show every candidate, not only the best."""
    json: bool = False
    """Print one JSON object, always with every candidate."""

    def run(self) -> int:
        from launch.explain import explain

        return explain(self.run_name, self.decision, as_json=self.json, all_candidates=self.all)


@dataclass
class Audit:
    """Say whether adapting was worth it, by the run's own data: gain over fixed configurations, trials, predictions.

    Example: copus audit shakespeare
    """

    run_name: Positional[OptionalRun] = None
    """Run directory, or its name below ./runs; the newest run there if it is not given."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        from launch.audit import audit

        return audit(self.run_name, as_json=self.json)


@dataclass
class Plot:
    """Draw loss, noise, batch, layout and throughput of a run over tokens.

    Example: copus plot shakespeare --output shakespeare.svg
    """

    run_name: Positional[OptionalRun] = None
    """Run directory, or its name below ./runs; the newest run there if it is not given."""
    output: Annotated[Path | None, arg(metavar="FILE.png|.svg")] = None
    """File to write; RUN/plot.png if it is not given."""
    json: bool = False
    """Print the file's path as a JSON object."""

    def run(self) -> int:
        from launch.plot import plot

        return plot(self.run_name, self.output, as_json=self.json)


@dataclass
class Watch:
    """Watch a run while it goes on, wherever its workers are; ends when the run ends. Ctrl-C leaves; the run goes on.

    Example: copus watch shakespeare
    """

    run_name: Positional[OptionalRun] = None
    """Run directory, or its name below ./runs; the newest run there if it is not given."""
    once: bool = False
    """Print one frame and end."""
    web: bool = False
    """Serve the report of the run, live, to a browser on this machine: prints its address, which has a token in it."""
    json: bool = False
    """Print a JSON object a line whenever something has changed; with --once a single one."""

    def run(self) -> int:
        from launch.watch import watch

        return watch(self.run_name, once=self.once, as_json=self.json, web=self.web)


@dataclass
class Runs:
    """List the runs in a folder, and what each is doing: running, stalled, finished, stopped, failed, crashed.

    Example: copus runs /shared/runs --json
    """

    folder: Positional[Annotated[Path | None, arg(metavar="[FOLDER]", help_behavior_hint="")]] = None
    """Folder with run directories; $COPUS_RUNS or ./runs if it is not given."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        from launch.runs import runs

        return runs(self.folder, as_json=self.json)


@dataclass
class Report:
    """Write a run, or a comparison of several, as one HTML page that needs nothing else: no network, no other file.

    Example: copus report shakespeare · copus report with-moves without-moves --output both.html
    """

    run_names: Positional[Annotated[list[str], arg(metavar="[RUN …]", name="runs", help_behavior_hint="")]] = field(
        default_factory=list
    )
    """Run directories, or their names below ./runs; the newest run there if none is given."""
    output: Annotated[Path | None, arg(metavar="FILE.html")] = None
    """File to write; RUN/report.html if it is not given, and comparison.html in this folder for several runs."""
    json: bool = False
    """Print the file's path as a JSON object."""

    def run(self) -> int:
        from launch.report import report

        return report(self.run_names, self.output, as_json=self.json)


@dataclass
class Data:
    """Fetch and tokenize the text of a job, unless that is done already, and print where it lies.

    Example: copus data examples/shakespeare.yaml · copus data shakespeare --verify
    """

    job: Positional[Annotated[str, arg(metavar="JOB.yaml|RUN")]]
    """Job file, or a run: a path, or a name below ./runs."""
    overrides: Overrides = field(default_factory=list)
    """Override a field of the job file."""
    verify: bool = False
    """Prepare nothing: read the data that is there and compare it with its checksums."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> int:
        from launch.data import data

        return data(self.job, self.overrides, verify=self.verify, as_json=self.json)


@dataclass
class Export:
    """Write the weights of a run for other tools: a folder that transformers opens, or a checkpoint of Megatron-LM.

    Needs no accelerator, and little memory. Example: copus export shakespeare --to hf shakespeare-hf --dtype bf16
    """

    run_name: Positional[Run]
    """Run directory, or its name below ./runs."""
    folder: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Folder to write; nothing may be there yet."""
    to: Annotated[Literal["hf", "megatron"], arg(metavar="hf|megatron")] = "hf"
    """hf: a Hugging Face folder of safetensors files. megatron: Megatron-LM's format torch_dist."""
    checkpoint: Annotated[str | None, arg(metavar="CHECKPOINT")] = None
    """A checkpoint's folder, its name, or its sequences; else the newest that verifies."""
    dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, arg(metavar="bf16|fp16|fp32")] = None
    """Type of the weights; that of training.precision if it is not given."""
    json: bool = False
    """Print one JSON object on stdout, and the progress on stderr."""

    def run(self) -> int:
        from launch.export import export

        return export(self.run_name, self.folder, self.to, self.checkpoint, self.dtype, as_json=self.json)


@dataclass
class ProfileRun:
    """Measure the step time of a job's configurations and keep it in the throughput table, with the job's profiler.

    Example: copus profile run examples/shakespeare.yaml --set profile.budget_seconds=600
    """

    job: Positional[JobFile]
    """Job file."""
    overrides: Overrides = field(default_factory=list)
    """Override a field of the job file."""
    json: bool = False
    """Print one JSON object on stdout, and the progress on stderr."""

    def run(self) -> int:
        from launch.profile import profile

        return profile(self.job, self.overrides, as_json=self.json)


@dataclass
class ProfileShow:
    """Show what throughput tables know: samples/s over global batch for each layout, crossings, failures.

    Example: copus profile show examples/shakespeare.yaml --layout TP2 --where "global_batch >= 8" --plot lines.png
    """

    places: Positional[Annotated[list[str], arg(metavar="[TABLE|JOB …]", help_behavior_hint="")]] = field(
        default_factory=list
    )
    """Tables (merged), or a job file or run: its table, its model alone. The usual table if none is given."""
    table: Annotated[Path | None, arg(metavar="TABLE.jsonl")] = None
    """Table to look into: one more, and in place of a job's own."""
    model: Annotated[str | None, arg(metavar="DIGEST")] = None
    """Only models whose digest begins so."""
    layout: Annotated[str | None, arg(metavar="LAYOUT")] = None
    """Only layouts with these degrees: TP2·PP1, tp=2,dp=4, Z1, SP, recompute:full."""
    hardware: Annotated[str | None, arg(metavar="TEXT")] = None
    """Only hardware whose name has this in it."""
    where: Annotated[str | None, arg(metavar="SQL")] = None
    """Only rows for which this holds; any column of a row: tokens_per_second > 1e4, failure IS NOT NULL."""
    plot: Annotated[Path | None, arg(metavar="FILE.png|.svg")] = None
    """Draw the lines to this file; needs pip install 'copus[plot]'."""
    json: bool = False
    """Print one JSON object: every row that was kept, repeats of a configuration as one."""

    def run(self) -> int:
        from launch.profile_show import show
        from profiles.query import Filter

        wanted = Filter((self.model,) if self.model else (), self.layout, self.hardware, self.where)
        return show(self.places, self.table, wanted, self.plot, as_json=self.json)


@dataclass
class ProfileImport:
    """Add measurements of others to a throughput table: CSV files, or other tables. What is there already stays once.

    Example: copus profile import published.csv other-machine.jsonl --table throughput.jsonl
    """

    sources: Positional[Annotated[list[Path], arg(metavar="FILE.csv|.jsonl")]]
    """What to add; docs/tables.md has the columns of a CSV file."""
    table: Annotated[Path | None, arg(metavar="TABLE.jsonl")] = None
    """Table to add to; the usual one if it is not given."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        from launch.profile_import import import_rows

        return import_rows(self.sources, self.table, as_json=self.json)


@dataclass
class Profile:
    """What is known of throughput: measure it (run), look at it (show), take it over (import).

    Example: copus profile run examples/shakespeare.yaml. `copus profile JOB.yaml` is short for that.
    """

    action: (
        Annotated[ProfileRun, subcommand("run")]
        | Annotated[ProfileShow, subcommand("show")]
        | Annotated[ProfileImport, subcommand("import")]
    )

    def run(self) -> int:
        return self.action.run()


@dataclass
class Plan:
    """Say what to expect of a job without launching it, and what to begin in: what fits, how fast, for how much.

    Needs no accelerator. Times are measured ones where the throughput table has them, else the cost model's.
    Example: copus plan examples/shakespeare.yaml --set cluster.accelerator=h100-sxm
    """

    job: Positional[JobFile]
    """Job file."""
    overrides: Overrides = field(default_factory=list)
    """Override a field of the job file."""
    price: Annotated[float | None, arg(metavar="PRICE")] = None
    """Price of an hour of one accelerator, in any currency: says what the run costs."""
    backend: Annotated[list[str], UseAppendAction, arg(metavar="NAME")] = field(default_factory=list)
    """Plan for this backend instead of training.backend; given several times, all of them in one table."""
    all: bool = False
    """Show every candidate, not only the fastest of each global batch."""
    emit: Annotated[str | None, arg(metavar="TOOL")] = None
    """Print only the best run that keeps its layout, as arguments of megatron, megatron-0.17, bridge, torchtitan,
    deepspeed or accelerate."""
    json: bool = False
    """Print one JSON object, always with every candidate."""

    def run(self) -> int:
        if len(self.backend) > 1:
            from copus.job import JobError
            from launch.plan_backends import plan_backends

            if self.all or self.price is not None or self.emit is not None:
                raise JobError(
                    "--all, --price and --emit go with one --backend: several are compared by their fastest layouts"
                )
            return plan_backends(self.job, self.overrides, self.backend, as_json=self.json)
        from launch.plan import plan

        backend = self.backend[0] if self.backend else None
        return plan(
            self.job, self.overrides, self.price, backend, self.emit, as_json=self.json, all_candidates=self.all
        )


@dataclass
class Advise:
    """Say what batch and layout a training of your own should take now, from its noise scale and step times.

    The log is what copus.NoiseMeter writes, TensorBoard's event files, or a CSV that W&B exported. Example: copus
    advise job.yaml meter.jsonl --emit megatron
    """

    job: Positional[JobFile]
    """Job file that describes the training; `copus import-args` writes one."""
    log: Positional[Annotated[Path, arg(metavar="LOG")]]
    """Log of the steps: .jsonl, an event file or the folder of one, .csv."""
    overrides: Overrides = field(default_factory=list)
    """Override a field of the job file."""
    restart_seconds: float = 300.0
    """What going on in another layout costs, if planner.layout_move_seconds does not say it; another batch is free."""
    watch: bool = False
    """Go on, and print the advice again whenever it changes. Ctrl-C ends it."""
    all: bool = False
    """Show every candidate, not only the best."""
    emit: Annotated[str | None, arg(metavar="TOOL")] = None
    """Print what is advised as arguments of another tool, as for `copus plan`."""
    json: bool = False
    """Print one JSON object, with --watch one a line."""

    def run(self) -> int:
        from launch.advise import advise

        return advise(
            self.job,
            self.log,
            self.overrides,
            self.restart_seconds,
            self.emit,
            watch=self.watch,
            as_json=self.json,
            all_candidates=self.all,
        )


@dataclass
class ImportArgs:
    """Print the job file for a training that another tool's arguments describe; nothing is run.

    Takes a command line, a shell script with its own arguments, a YAML of Megatron-Bridge or NeMo, a torchtitan TOML.
    What has no field becomes a comment. Examples: copus import-args train.sh · copus import-args -- torchrun …
    """

    words: Positional[Annotated[list[str], arg(metavar="SCRIPT|FILE|-- COMMAND …")]]
    """Script with its arguments, configuration, or a command line after --; NAME=VALUE before it sets a variable."""
    overrides: Overrides = field(default_factory=list)
    """Set a field that the arguments do not say: cluster.accelerator, model.vocab."""
    out: Annotated[Path | None, arg(metavar="JOB.yaml")] = None
    """Write the job file there and not on stdout."""
    json: bool = False
    """Print one JSON object with the job, and with what became of every argument."""

    def run(self) -> int:
        from launch.import_args import import_args

        return import_args(self.words, self.overrides, self.out, as_json=self.json)


@dataclass
class ImportHF:
    """Print a job file that trains a Hugging Face folder further, after a check of its weights; nothing is run.

    Example: copus import-hf ~/models/mine --set data.source=texts --set cluster.accelerators_per_node=8 --out job.yaml
    """

    folder: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Folder with config.json and safetensors files."""
    overrides: Overrides = field(default_factory=list)
    """Set a field of the job file: data.source, cluster.accelerator, training.tokens."""
    out: Annotated[Path | None, arg(metavar="JOB.yaml")] = None
    """Write the job file there and not on stdout."""
    json: bool = False
    """Print one JSON object with the job."""

    def run(self) -> int:
        from launch.import_hf import import_hf

        return import_hf(self.folder, self.overrides, self.out, as_json=self.json)


@dataclass
class Calibrate:
    """Measure the critical batch of a run: train branches of a checkpoint at several batches, for equal tokens.

    Prints c = critical batch / noise scale, and writes RUN/calibration.json for planner.critical_batch_factor. Called
    again, it goes on where it was. Example: copus calibrate shakespeare --multiples 1,2,4,8 --orders 3
    """

    run_name: Positional[Run]
    """Run directory, or its name below ./runs. Its workers must not be running."""
    checkpoint: Annotated[str | None, arg(metavar="CHECKPOINT")] = None
    """Where the branches begin: a folder, its name, or its sequences; else the newest that verifies."""
    multiples: Annotated[str, arg(metavar="K,K,…")] = "1,2,4,8"
    """Batches to compare, as multiples of the checkpoint's own; the learning rate follows by the rules of the job."""
    tokens: Annotated[int | None, arg(metavar="N")] = None
    """Length of a branch, rounded up to whole steps of every batch; 16 steps of the largest if it is not given."""
    orders: Annotated[int, arg(metavar="K")] = 3
    """Orders of the data, each for every batch; the interval comes from how much they differ."""
    tolerance: float = 0.01
    """Nats a token that a batch may be worse than the smallest, for the figure without a model (2505.23971)."""
    json: bool = False
    """Print one JSON object on stdout, and the progress on stderr."""

    def run(self) -> int:
        from launch.calibrate import calibrate

        return calibrate(
            self.run_name,
            self.checkpoint,
            self.multiples,
            self.tokens,
            self.orders,
            self.tolerance,
            as_json=self.json,
        )


@dataclass
class Simulate:
    """Say how long a job would take with each policy, from measured step times, and whether adapting is worth it.

    Needs a law of the noise scale, or a run that measured it. Example: copus simulate examples/shakespeare.yaml
    --noise 4:64 --policy copus --policy goodput
    """

    job: Positional[JobFile]
    """Job file; its throughput table has the times."""
    overrides: Overrides = field(default_factory=list)
    """Override a field of the job file."""
    policy: Annotated[list[str], UseAppendAction, arg(metavar="NAME")] = field(default_factory=list)
    """Policy to simulate, may be repeated: static, smallest-saturating, ramp, seesaw, late-switch, norm-test,
    norm-test-paper, cbs, cbs-pessimistic, cbs-optimistic, cbs-doubling, copus, goodput. If none is given: all, or with
    --like the one of the job file."""
    noise: Annotated[str | None, arg(metavar="FIRST:LAST")] = None
    """B_simple at the beginning and at the end, sequences; or FILE.csv:MODEL, a published batch schedule."""
    law: Annotated[str, arg(metavar="LAW")] = "geometric"
    """How it grows over the progress: geometric, linear, power."""
    like: Annotated[str | None, arg(metavar="RUN")] = None
    """Take the length, the noise scale, the cost of moves and how the machine wandered from the events of this run;
    simulate errors of the table and trials too, and print the moves to be expected beside those that it made."""
    error: Annotated[float | None, arg(metavar="E")] = None
    """Standard deviation of the logarithm of a noise estimate that is there from the start, without any lag. If it is
    not given, the noise scale is measured as in a job."""
    factor_error: float = 1.0
    """What the c of the job is over the right one."""
    move_seconds: Annotated[float | None, arg(metavar="S")] = None
    """Cost of another layout; else that of --like, else planner.layout_move_seconds."""
    seeds: int = 16
    """Runs of each policy."""
    plot: Annotated[Path | None, arg(metavar="FILE.png|.svg")] = None
    """Draw batches and times to a file."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> int:
        from launch.simulate import simulate

        return simulate(
            self.job,
            self.overrides,
            self.policy,
            self.noise,
            self.law,
            self.like,
            error=self.error,
            factor_error=self.factor_error,
            move_seconds=self.move_seconds,
            seeds=self.seeds,
            output=self.plot,
            as_json=self.json,
        )


Commands = (
    Annotated[Submit, subcommand("submit")]
    | Annotated[Logs, subcommand("logs")]
    | Annotated[Cancel, subcommand("cancel")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Profile, subcommand("profile")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[ImportArgs, subcommand("import-args")]
    | Annotated[Advise, subcommand("advise")]
    | Annotated[Watch, subcommand("watch")]
    | Annotated[Runs, subcommand("runs")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Audit, subcommand("audit")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Plot, subcommand("plot")]
    | Annotated[Export, subcommand("export")]
    | Annotated[ImportHF, subcommand("import-hf")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Simulate, subcommand("simulate")]
)

DESCRIPTION = (
    "Trains language models, and chooses batch and layout together while they train. `copus COMMAND --help` says more."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns the exit code: 0, 1 where workers failed, 2 for what the user has to mend, 128 + signal where stopped.
    """
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that lacks a sign gets a "?"
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"copus {version('copus')}")
        return 0
    if misspelt := _misspelt(arguments):
        print(f"copus: {misspelt}", file=sys.stderr)
        return 2
    try:
        command: Command = tyro.cli(
            Commands,
            prog="copus",
            description=DESCRIPTION,
            args=_in_full(arguments or ["--help"]),
            config=(FlagCreatePairsOff, OmitArgPrefixes),
        )
        return _run(command, as_json=getattr(command, "json", False))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (`head`, a pager) has seen enough; keep the interpreter's own flush quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(command: Command, *, as_json: bool) -> int:
    """Run a command and return its exit code. An error that the user has to fix is printed in one line, and as an
    object on standard output if that is what the caller reads."""
    from copus.user_errors import EXIT_CODE, user_message  # after the parsing: --help needs none of it

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = command.run()
        sys.stdout.flush()
        return code
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
    print(f"copus: {message}", file=sys.stderr)
    if as_json:
        from launch.json_output import as_json_line

        print(as_json_line({"error": message}))
    return EXIT_CODE


def _warn(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """A warning in one line, without the place in the code."""
    print(f"copus: warning: {message}", file=sys.stderr)


def _misspelt(arguments: list[str]) -> str | None:
    """What to say of a command that there is not; None if there is no such command line."""
    names = [metadata.name for command in get_args(Commands) for metadata in command.__metadata__]
    if not arguments or arguments[0].startswith("-") or arguments[0] in names:
        return None
    near = difflib.get_close_matches(arguments[0], names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"no command {arguments[0]}; {hint}"


def _in_full(arguments: list[str]) -> list[str]:
    """`copus profile JOB.yaml` as `copus profile run JOB.yaml`."""
    asks = {"run", "show", "import", "-h", "--help"}
    if arguments[:1] == ["profile"] and len(arguments) > 1 and asks.isdisjoint(arguments[1:]):
        return ["profile", "run", *arguments[1:]]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
