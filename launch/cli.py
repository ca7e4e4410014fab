"""The `copus` command: what can be typed, and its help. What each command does is in the file of its name.

Nothing heavy is imported here: `copus --help` is for people, and answers at once.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import shell_complete

from launch.command import (
    FILE,
    PROGRESS_JSON,
    RUN_HELP,
    CommandGroup,
    attended_engine_option,
    complete_job_or_run,
    complete_run,
    job_argument,
    json_option,
    newest_run_argument,
    run_argument,
    set_option,
)

COMPLETION = "_COPUS_COMPLETE"
"""The variable by which the shell asks for completions."""
TRAIN = "Train"
BEFORE = "Before a run"
LOOK = "Look at a run"
OTHER_TOOLS = "With other tools"


@click.group("copus", cls=CommandGroup, examples=["copus submit examples/shakespeare.yaml", "copus watch"])
@click.version_option(package_name="copus", message="copus %(version)s")
def copus() -> None:
    """Train language models, and choose batch and layout together while they train.

    `copus COMMAND --help` describes a command.
    """


@copus.command(
    section=TRAIN,
    examples=[
        "copus submit examples/shakespeare.yaml --set training.seed=7",
        "copus submit --resume shakespeare",
        "copus submit job.yaml --seeds 3 --matrix training.lr=1e-3,2e-3",
    ],
)
@click.argument(
    "job", metavar="[JOB.yaml]", required=False, type=FILE, help="Job file. With --resume: its new settings."
)
@set_option()
@click.option("--name", metavar="NAME", help="Name of the run; short for --set name=NAME.")
@click.option(
    "--resume",
    metavar="RUN",
    shell_complete=complete_run,
    help="Continue this run exactly where it stopped. A path, or a name below $COPUS_RUNS or ./runs.",
)
@click.option(
    "--allow-from-scratch",
    is_flag=True,
    help="With --resume: train from the first step again if no checkpoint verifies, instead of refusing.",
)
@click.option(
    "--engine",
    metavar="ENGINE",
    help="Run the job with this engine instead of launch.engine: local, hosts, slurm, srun, kubernetes, or one that a "
    "plugin adds. launch.options is left out.",
)
@click.option("--dry-run", is_flag=True, help="Print the command, script or manifest that would run the job, and stop.")
@click.option("--detach", is_flag=True, help="Return as soon as the job is queued. For engines with a queue.")
@click.option(
    "--seeds",
    metavar="N",
    type=int,
    help="Train N runs with consecutive seeds, from training.seed on, and compare them.",
)
@click.option(
    "--matrix",
    metavar="SECTION.FIELD=V,V,…",
    multiple=True,
    help="Train a run with each of these values of a field. Repeatable: every combination, with all --seeds. The same "
    "command again goes on with what has not ended.",
)
@click.option(
    "--fail-fast",
    is_flag=True,
    help="With --seeds or --matrix: start no further run, and queue none, once one has failed.",
)
@click.option(
    "--at-once",
    metavar="N",
    type=int,
    help="With --seeds or --matrix, on an engine with a queue: have at most N of the runs in it, and add the next when "
    "one has ended. With --detach, on Slurm: let at most N tasks of their array run.",
)
@json_option(PROGRESS_JSON)
def submit(
    job: Path | None,
    overrides: Sequence[str],
    name: str | None,
    resume: str | None,
    allow_from_scratch: bool,
    engine: str | None,
    dry_run: bool,
    detach: bool,
    seeds: int | None,
    matrix: Sequence[str],
    fail_fast: bool,
    at_once: int | None,
    as_json: bool,
) -> int:
    """Train a job, which moves to a better batch and layout as it runs.

    Ctrl-C stops the job with a checkpoint. On an engine with a queue (slurm, kubernetes), Ctrl-C detaches and the job
    keeps running; `copus cancel RUN` stops it.
    """
    from launch.submit import SubmitOptions, submit

    options = SubmitOptions(engine, dry_run, allow_from_scratch, detach, as_json)
    settings = [*overrides, *([] if name is None else [f"name={name}"])]
    if seeds is not None or matrix:
        from launch.submit_group import submit_group

        if resume is not None or allow_from_scratch:
            raise click.UsageError("--seeds and --matrix go on by the same command again, without --resume")
        return submit_group(job, settings, matrix, seeds, options, fail_fast=fail_fast, at_once=at_once)
    for option, is_given in (("--fail-fast", fail_fast), ("--at-once", at_once is not None)):
        if is_given:
            raise click.UsageError(f"{option}: only with --seeds or --matrix")
    return submit(job, settings, resume, options)


@copus.command(section=TRAIN, examples=["copus cancel shakespeare"])
@run_argument()
@click.option("--now", is_flag=True, help="End the workers at once, without a checkpoint.")
@json_option()
def cancel(run: str, now: bool, as_json: bool) -> int:
    """Stop a run with a checkpoint, at its next step.

    `copus submit --resume RUN` continues it.
    """
    from launch.cancel import cancel

    return cancel(run, now=now, as_json=as_json)


@copus.command(section=TRAIN, examples=["copus data examples/shakespeare.yaml", "copus data shakespeare --verify"])
@click.argument("job", metavar="JOB.yaml|RUN", shell_complete=complete_job_or_run, help=f"Job file. {RUN_HELP}.")
@set_option()
@click.option("--verify", is_flag=True, help="Compare the data that is there with its checksums; prepare nothing.")
@json_option()
def data(job: str, overrides: Sequence[str], verify: bool, as_json: bool) -> int:
    """Fetch and tokenize the text of a job, and print the folder.

    What is prepared already is used again.
    """
    from launch.data import data

    return data(job, list(overrides), verify=verify, as_json=as_json)


@copus.command(
    section=BEFORE,
    examples=[
        "copus plan examples/shakespeare.yaml --set cluster.accelerator=h100-sxm",
        "copus plan examples/llama-7b-h100.yaml --price 2.5",
    ],
)
@job_argument
@set_option()
@click.option("--price", metavar="PRICE", type=float, help="Price of one accelerator-hour, in any currency.")
@click.option(
    "--backend",
    metavar="NAME",
    multiple=True,
    help="Plan for this backend instead of training.backend. Repeatable: several are compared in one table.",
)
@click.option(
    "--stack",
    metavar="NAME",
    help="Predict times, and the memory of its kernels, as of this software, not as of the backend: megatron-te (with "
    "Transformer Engine), megatron, megatron-deepspeed, nanotron, fsdp or deepspeed.",
)
@click.option("--all", "all_candidates", is_flag=True, help="Show every candidate, not only the fastest of each batch.")
@click.option(
    "--emit",
    metavar="TOOL",
    help="Print only the best run that keeps its layout, as arguments of this tool: megatron, megatron-0.17, bridge, "
    "torchtitan, deepspeed or accelerate.",
)
@json_option("Print one JSON object, always with every candidate.")
def plan(
    job: Path,
    overrides: Sequence[str],
    price: float | None,
    backend: Sequence[str],
    stack: str | None,
    all_candidates: bool,
    emit: str | None,
    as_json: bool,
) -> int:
    """Predict memory, speed and price of a job, and recommend a start.

    Nothing is launched, and no accelerator is needed. Step times come from the throughput table if it has them, else
    from the cost model.
    """
    if len(backend) > 1:
        from launch.plan_backends import plan_backends

        if all_candidates or price is not None or emit is not None or stack is not None:
            raise click.UsageError(
                "--all, --price, --stack and --emit go with one --backend: several are compared by their fastest "
                "layouts"
            )
        return plan_backends(job, list(overrides), list(backend), as_json=as_json)
    from launch.plan import plan

    only = backend[0] if backend else None
    return plan(job, list(overrides), price, only, emit, stack, as_json=as_json, all_candidates=all_candidates)


@copus.group(section=BEFORE, cls=CommandGroup, examples=["copus profile run examples/shakespeare.yaml"])
def profile() -> None:
    """Measure step times (run), show them (show), import them (import).

    `copus profile JOB.yaml` is short for `copus profile run JOB.yaml`.
    """


@profile.command("run", examples=["copus profile run examples/shakespeare.yaml --set profile.budget_seconds=600"])
@job_argument
@set_option()
@attended_engine_option
@json_option(PROGRESS_JSON)
def profile_run(job: Path, overrides: Sequence[str], engine: str | None, as_json: bool) -> int:
    """Measure the step times of a job's configurations.

    The job's profiler measures them, and the throughput table keeps them.
    """
    from launch.profile import profile

    return profile(job, list(overrides), engine, as_json=as_json)


@profile.command(
    "show",
    examples=[
        "copus profile show examples/shakespeare.yaml --layout TP2",
        'copus profile show --where "global_batch >= 8" --plot throughput.png',
    ],
)
@click.argument(
    "places",
    metavar="[TABLE|JOB …]",
    nargs=-1,
    shell_complete=complete_job_or_run,
    help="Throughput tables, which are merged; or a job file or run, whose table and model are shown. Without it the "
    "default table.",
)
@click.option("--table", metavar="TABLE.jsonl", type=FILE, help="Table to read instead of the job's, or as one more.")
@click.option("--model", metavar="DIGEST", help="Show models whose digest begins with this.")
@click.option(
    "--layout",
    metavar="LAYOUT",
    help='Show layouts with these degrees: "TP2·PP1", "tp=2,dp=4", "Z1", "recompute:full".',
)
@click.option("--hardware", metavar="TEXT", help="Show hardware whose name contains this.")
@click.option(
    "--where", metavar="SQL", help='Show rows for which this holds: "tokens_per_second > 1e4", "failure IS NOT NULL".'
)
@click.option(
    "--plot", metavar="FILE.png|.svg", type=FILE, help="Draw the lines to this file. Needs pip install 'copus[plot]'."
)
@json_option("Print one JSON object with every row that is shown; repeats of a configuration are one row.")
def profile_show(
    places: Sequence[str],
    table: Path | None,
    model: str | None,
    layout: str | None,
    hardware: str | None,
    where: str | None,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Show the throughput of each layout by global batch.

    Also where one layout overtakes another, and the configurations that failed.
    """
    from launch.profile_show import show
    from profiles.query import Filter

    wanted = Filter((model,) if model else (), layout, hardware, where)
    return show(list(places), table, wanted, plot, as_json=as_json)


@profile.command("import", examples=["copus profile import published.csv other.jsonl --table throughput.jsonl"])
@click.argument(
    "sources",
    metavar="FILE.csv|.jsonl …",
    nargs=-1,
    required=True,
    type=FILE,
    help="Files to add. docs/tables.md describes the columns of a CSV file.",
)
@click.option("--table", metavar="TABLE.jsonl", type=FILE, help="Table to add to, instead of the default one.")
@json_option()
def profile_import(sources: Sequence[Path], table: Path | None, as_json: bool) -> int:
    """Add measurements from CSV files or other tables.

    Rows that the table has already are not added again.
    """
    from launch.profile_import import import_rows

    return import_rows(list(sources), table, as_json=as_json)


@copus.command(
    section=BEFORE,
    examples=[
        "copus simulate examples/shakespeare.yaml --noise 4:64 --policy goodput",
        "copus simulate JOB.yaml --like RUN",
    ],
)
@click.argument("job", metavar="JOB.yaml", type=FILE, help="Job file. Its throughput table has the step times.")
@set_option()
@click.option(
    "--policy",
    metavar="NAME",
    multiple=True,
    help="Policy to simulate. Repeatable: static, smallest-saturating, ramp, seesaw, late-switch, norm-test, "
    "norm-test-paper, cbs, cbs-pessimistic, cbs-optimistic, cbs-doubling, copus, goodput. Without it all of them, or "
    "with --like that of the job file.",
)
@click.option(
    "--noise",
    metavar="FIRST:LAST",
    help="Noise scale B_simple at the first and last step, sequences; or FILE.csv:MODEL, a published batch schedule.",
)
@click.option(
    "--law",
    metavar="LAW",
    default="geometric",
    help="How the noise scale grows between the two: geometric, linear or power.",
)
@click.option(
    "--like",
    metavar="RUN",
    shell_complete=complete_run,
    help="Take length, noise scale, cost of moves and variation of step times from this run. Also simulate errors of "
    "the table and trials, and compare the expected moves with those of the run.",
)
@click.option(
    "--error",
    metavar="E",
    type=float,
    help="Give the policies a noise scale from the first step on, without lag, whose logarithm has this standard "
    "deviation. Without it the noise scale is estimated as in a job.",
)
@click.option(
    "--factor-error",
    metavar="RATIO",
    type=float,
    default=1.0,
    help="The job's critical_batch_factor over the true one.",
)
@click.option(
    "--move-seconds",
    metavar="S",
    type=float,
    help="Cost of a move to another layout, seconds. Without it that of --like, else planner.layout_move_seconds.",
)
@click.option("--seeds", metavar="N", type=int, default=16, help="Simulated runs of each policy.")
@click.option("--plot", metavar="FILE.png|.svg", type=FILE, help="Draw batches and times to this file.")
@json_option(PROGRESS_JSON)
def simulate(
    job: Path,
    overrides: Sequence[str],
    policy: Sequence[str],
    noise: str | None,
    law: str,
    like: str | None,
    error: float | None,
    factor_error: float,
    move_seconds: float | None,
    seeds: int,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Compare policies on a job, from measured step times.

    Says whether adapting is worth it. Needs an assumed growth of the noise scale (--noise), or a run that measured it
    (--like).
    """
    from launch.simulate import simulate

    return simulate(
        job,
        list(overrides),
        list(policy),
        noise,
        law,
        like,
        error=error,
        factor_error=factor_error,
        move_seconds=move_seconds,
        seeds=seeds,
        output=plot,
        as_json=as_json,
    )


@copus.command(section=LOOK, examples=["copus watch shakespeare"])
@newest_run_argument
@click.option("--once", is_flag=True, help="Print the present state and stop.")
@click.option(
    "--web",
    is_flag=True,
    help="Serve the report of the run, live, to a browser on this machine. Prints its address, which contains a token.",
)
@json_option("Print a JSON object on a line of its own at every change; with --once a single one.")
def watch(run: str | None, once: bool, web: bool, as_json: bool) -> int:
    """Show a run as it trains, until it ends.

    Ctrl-C detaches; the run keeps running. The exit code is 1 if the run failed.
    """
    from launch.watch import watch

    return watch(run, once=once, as_json=as_json, web=web)


@copus.command(section=LOOK, examples=["copus runs /shared/runs --json", "copus runs --group shakespeare"])
@click.argument(
    "folder",
    metavar="[FOLDER]",
    required=False,
    type=click.Path(path_type=Path, file_okay=True),
    help="Folder with run directories. Without it $COPUS_RUNS or ./runs.",
)
@click.option(
    "--group",
    metavar="GROUP",
    help="Only the runs of `copus submit --seeds` or `--matrix`, and their results. A name in that folder, or "
    "FOLDER/NAME.",
)
@json_option()
def runs(folder: Path | None, group: str | None, as_json: bool) -> int:
    """List the runs in a folder with their state and progress.

    A run is queued, starting, measuring, running, stalled, finished, stopped, failed or crashed.
    """
    from launch.runs import runs

    return runs(folder, group, as_json=as_json)


@copus.command(section=LOOK, examples=["copus logs shakespeare --follow --rank 0"])
@newest_run_argument
@click.option("--rank", metavar="N", type=int, help="Print the lines of this rank only, not those of all ranks.")
@click.option("--follow", "-f", is_flag=True, help="Wait for more lines until the run has ended.")
def logs(run: str | None, rank: int | None, follow: bool) -> int:
    """Print the output of a run's workers: a line for each step."""
    from launch.logs import logs

    return logs(run, rank, follow=follow)


@copus.command(section=LOOK, examples=["copus explain shakespeare --decision 3"])
@newest_run_argument
@click.option(
    "--decision",
    metavar="N",
    type=int,
    help="Number of the decision. Without it the newest that moved the job, else the newest.",
)
@click.option("--all", "all_candidates", is_flag=True, help="Show every candidate, not only the best eight.")
@json_option("Print one JSON object, always with every candidate.")
def explain(run: str | None, decision: int | None, all_candidates: bool, as_json: bool) -> int:
    """Show a decision of the planner, and why it was taken.

    Lists the candidates with the time that each would save, and compares the predicted step time with the measured one.
    """
    from launch.explain import explain

    return explain(run, decision, as_json=as_json, all_candidates=all_candidates)


@copus.command(section=LOOK, examples=["copus audit shakespeare"])
@newest_run_argument
@json_option()
def audit(run: str | None, as_json: bool) -> int:
    """Check by a run's own data whether adapting paid off.

    Reports the gain over fixed configurations, what trials cost and brought, and how good the predictions were.
    """
    from launch.audit import audit

    return audit(run, as_json=as_json)


@copus.command(
    section=LOOK,
    examples=["copus report shakespeare", "copus report with-moves without-moves --output both.html"],
)
@click.argument(
    "names",
    metavar="[RUN …]",
    nargs=-1,
    shell_complete=complete_run,
    help="Run directories, or their names below $COPUS_RUNS or ./runs. Without it the newest run there.",
)
@click.option(
    "--output",
    metavar="FILE.html",
    type=FILE,
    help="File to write. Without it RUN/report.html, or ./comparison.html for several runs.",
)
@click.option(
    "--group",
    metavar="GROUP",
    help="The runs of `copus submit --seeds` or `--matrix`, in one page. FOLDER/NAME, or a name in $COPUS_RUNS or "
    "./runs.",
)
@json_option("Print the path of the file as a JSON object.")
def report(names: Sequence[str], output: Path | None, group: str | None, as_json: bool) -> int:
    """Write an HTML page about a run, or compare several runs.

    The page needs no network and no other file.
    """
    from launch.report import report

    return report(list(names), output, group, as_json=as_json)


@copus.command(section=LOOK, examples=["copus plot shakespeare --output shakespeare.svg"])
@newest_run_argument
@click.option("--output", metavar="FILE.png|.svg", type=FILE, help="File to write. Without it RUN/plot.png.")
@json_option("Print the path of the file as a JSON object.")
def plot(run: str | None, output: Path | None, as_json: bool) -> int:
    """Draw loss, noise scale, batch, layout and throughput."""
    from launch.plot import plot

    return plot(run, output, as_json=as_json)


@copus.command(
    section=LOOK, examples=["copus calibrate shakespeare", "copus calibrate shakespeare --multiples 1,2,4,8 --orders 3"]
)
@run_argument(". Its workers must not be running")
@click.option(
    "--checkpoint",
    metavar="CHECKPOINT",
    help="Checkpoint that the branches start from: a folder, its name, or its sequences. Without it the newest that "
    "verifies.",
)
@click.option(
    "--multiples",
    metavar="K,K,…",
    default="1,2,4,8",
    help="Batches to compare, as multiples of the checkpoint's. The learning rate follows the rules of the job.",
)
@click.option(
    "--tokens",
    metavar="N",
    type=int,
    help="Length of a branch, rounded up to whole steps of every batch. Without it 16 steps of the largest batch.",
)
@click.option(
    "--orders",
    metavar="K",
    type=int,
    default=3,
    help="Orders of the data, for every batch. The interval comes from the differences between them.",
)
@click.option(
    "--tolerance",
    metavar="LOSS",
    type=float,
    default=0.01,
    help="Loss in nats per token that a batch may be worse than the smallest, for the estimate without a model "
    "(arXiv 2505.23971).",
)
@attended_engine_option
@json_option(PROGRESS_JSON)
def calibrate(
    run: str,
    checkpoint: str | None,
    multiples: str,
    tokens: int | None,
    orders: int,
    tolerance: float,
    engine: str | None,
    as_json: bool,
) -> int:
    """Measure the critical batch by training short branches.

    The branches start from one checkpoint and train equal tokens at several batches. Prints c = critical batch / noise
    scale, and writes RUN/calibration.json for planner.critical_batch_factor. A second call continues the first.
    """
    from launch.calibrate import calibrate

    return calibrate(run, checkpoint, multiples, tokens, orders, tolerance, engine, as_json=as_json)


@copus.command(
    "import-args",
    section=OTHER_TOOLS,
    examples=[
        "copus import-args train.sh --out job.yaml",
        "copus import-args -- torchrun pretrain_gpt.py --num-layers 24 …",
    ],
)
@click.argument(
    "words",
    metavar="SCRIPT|FILE|-- COMMAND …",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
    shell_complete=complete_job_or_run,
    help="Shell script with its arguments, YAML of Megatron-Bridge or NeMo, TOML of torchtitan, or a command line "
    "after --. NAME=VALUE before it sets a variable.",
)
@set_option("Set a field that the arguments do not give, such as cluster.accelerator or model.vocab.")
@click.option("--out", metavar="JOB.yaml", type=FILE, help="Write the job file there and not to stdout.")
@json_option("Print one JSON object with the job and the fate of every argument.")
def import_args(words: Sequence[str], overrides: Sequence[str], out: Path | None, as_json: bool) -> int:
    """Print the job file for another tool's arguments.

    Nothing is run. Arguments that no field of a job file expresses become comments.
    """
    from launch.import_args import import_args

    return import_args(list(words), list(overrides), out, as_json=as_json)


@copus.command(
    "import-hf",
    section=OTHER_TOOLS,
    examples=["copus import-hf ~/models/mine --set data.source=texts --out job.yaml"],
)
@click.argument("folder", metavar="DIR", type=FILE, help="Folder with config.json and safetensors files.")
@set_option("Set a field of the job file, such as data.source, cluster.accelerator or training.tokens.")
@click.option("--out", metavar="JOB.yaml", type=FILE, help="Write the job file there and not to stdout.")
@json_option("Print one JSON object with the job.")
def import_hf(folder: Path, overrides: Sequence[str], out: Path | None, as_json: bool) -> int:
    """Print a job file that trains a Hugging Face model further.

    The weights are checked. Nothing is run.
    """
    from launch.import_hf import import_hf

    return import_hf(folder, list(overrides), out, as_json=as_json)


@copus.command(section=OTHER_TOOLS, examples=["copus advise job.yaml meter.jsonl --emit megatron"])
@click.argument(
    "job", metavar="JOB.yaml", type=FILE, help="Job file that describes the training; `copus import-args` writes one."
)
@click.argument(
    "log",
    metavar="LOG",
    type=FILE,
    help="Log of the steps: .jsonl of copus.NoiseMeter, TensorBoard's event file or folder, or .csv exported by W&B.",
)
@set_option()
@click.option(
    "--restart-seconds",
    metavar="S",
    type=float,
    default=300.0,
    help="Cost of a restart in another layout, seconds, if planner.layout_move_seconds is not set. A change of the "
    "batch alone costs nothing.",
)
@click.option("--watch", is_flag=True, help="Print the advice again whenever it changes. Ctrl-C ends it.")
@click.option("--all", "all_candidates", is_flag=True, help="Show every candidate, not only the best.")
@click.option("--emit", metavar="TOOL", help="Print the advice as arguments of another tool, as in `copus plan`.")
@json_option("Print one JSON object; with --watch one on each line.")
def advise(
    job: Path,
    log: Path,
    overrides: Sequence[str],
    restart_seconds: float,
    watch: bool,
    all_candidates: bool,
    emit: str | None,
    as_json: bool,
) -> int:
    """Recommend batch and layout for a trainer of your own.

    Uses the noise scale and step times in the trainer's log, and says how much time the change saves.
    """
    from launch.advise import advise

    return advise(
        job,
        log,
        list(overrides),
        restart_seconds,
        emit,
        watch=watch,
        as_json=as_json,
        all_candidates=all_candidates,
    )


@copus.command(section=OTHER_TOOLS, examples=["copus export shakespeare shakespeare-hf --to hf --dtype bf16"])
@run_argument()
@click.argument("folder", metavar="DIR", type=FILE, help="Folder to write. It must be empty or not exist.")
@click.option(
    "--to",
    type=click.Choice(["hf", "megatron"]),
    default="hf",
    help="Format: hf is a Hugging Face folder of safetensors files, megatron is Megatron-LM's torch_dist.",
)
@click.option(
    "--checkpoint",
    metavar="CHECKPOINT",
    help="Checkpoint to export: a folder, its name, or its sequences. Without it the newest that verifies.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Type of the weights. Without it that of training.precision.",
)
@json_option(PROGRESS_JSON)
def export(run: str, folder: Path, to: str, checkpoint: str | None, dtype: str | None, as_json: bool) -> int:
    """Write a run's weights for transformers or Megatron-LM.

    No accelerator is needed, and little memory.
    """
    from launch.export import export

    return export(run, folder, to, checkpoint, dtype, as_json=as_json)  # type: ignore[arg-type]  # click has checked


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns the exit code: 0, 1 if workers failed, 2 for a user error, 128 + signal if the command was stopped by one.
    """
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that lacks a sign gets a "?"
    if instruction := os.environ.get(COMPLETION):
        return shell_complete(copus, {}, "copus", COMPLETION, instruction)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = _run(_in_full(arguments or ["--help"]))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (`head`, a pager) has seen enough; keep the interpreter's own flush quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    """Parse the arguments, run the command and return its exit code. A user error is printed in one line, and as an
    object on standard output as well if the caller asked for JSON."""
    try:
        with copus.make_context("copus", list(arguments)) as context:
            return int(copus.invoke(context) or 0)
    except click.exceptions.Exit as ended:  # --help, --version
        return ended.exit_code
    except click.UsageError as error:
        message = _usage_message(error)
    except Exception as error:
        from copus.user_errors import user_message  # only now: --help needs none of it

        said = user_message(error)
        if said is None:
            raise
        message = said
    print(f"copus: {message}", file=sys.stderr)
    if "--json" in arguments[: arguments.index("--")] if "--" in arguments else "--json" in arguments:
        from launch.json_output import as_json_line

        print(as_json_line({"error": message}))
    return 2


def _usage_message(error: click.UsageError) -> str:
    """What is wrong with the command line, in a line, with the nearest names, or where to look for the right ones."""
    near = getattr(error, "possibilities", None) or []
    text = (error.message if near else error.format_message()).rstrip(".")
    text = text[:1].lower() + text[1:]
    if near:
        return f"{text}; did you mean {' or '.join(near)}?"
    return f"{text} (see {error.ctx.command_path} --help)" if error.ctx else text


def _warn(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """A warning in one line, without the place in the code. What a file says may be in it: it tells a terminal
    nothing."""
    line = "".join(letter if letter.isprintable() else "�" for letter in " ".join(str(message).splitlines()))
    print(f"copus: warning: {line}", file=sys.stderr)


def _in_full(arguments: list[str]) -> list[str]:
    """`copus profile JOB.yaml` as `copus profile run JOB.yaml`, and `copus profile` as a request for its help."""
    if arguments == ["profile"]:
        return ["profile", "--help"]
    asks = {"run", "show", "import", "-h", "--help"}
    if arguments[:1] == ["profile"] and asks.isdisjoint(arguments[1:]):
        return ["profile", "run", *arguments[1:]]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
