"""`copus calibrate`: measures the critical batch by branches of a checkpoint, and c = φ / B_simple."""

import hashlib
import json
import math
import shutil
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from copus.branches import Branches, plan_path, plan_text, read_plan
from copus.checkpoints.files import check_same_data
from copus.durable import write_atomically
from copus.events import Branch, read_events
from copus.job import JobConfig, JobError, load_job
from copus.manifest import MANIFEST
from launch.attend import Outcome, attend
from launch.checkpoint import find_checkpoint
from launch.data import check, prepare
from launch.engines import attended_engine_of, check_not_queued
from launch.interrupts import Interrupts
from launch.json_output import as_json_line
from launch.progress import SteadyConsole
from launch.run_directory import clear_stop, find_run, lock_run, shown, write_job
from profiles.calibration import Calibration
from profiles.configuration import Configuration
from profiles.formatting import count, duration, three_digits

PLACES = {"launch", "tracking"}
"""Sections of a job file that two calls of the command may have differently."""
SHORTEST = 16
"""Steps of the largest batch in a branch, where the user names no length."""


def calibrate(
    run_text: str,
    checkpoint_text: str | None,
    multiples_text: str,
    tokens: int | None,
    orders: int,
    tolerance: float,
    engine_name: str | None = None,
    *,
    as_json: bool = False,
) -> int:
    """Run what is missing of the branches, fit, and write RUN/calibration.json. Returns the exit code.

    Raises JobError for what the user has to mend; interrupted, it goes on where it was when called again.
    """
    if not 0 <= tolerance < math.inf:
        raise JobError(f"--tolerance {tolerance:g}: finite, at least 0")
    run = find_run(run_text)
    job = load_job(run / "job.yaml", engine=engine_name)
    console = SteadyConsole(stderr=True, highlight=False)
    checkpoint = find_checkpoint(run, checkpoint_text, console)
    branches = _plan(job, checkpoint, _multiples(multiples_text), tokens, orders)
    folder = run / "calibration" / f"{checkpoint.name}-{branches.sequences}"
    engine = attended_engine_of(job, "copus calibrate")
    check(job)
    engine.ready(job)
    console.print(_announcement(job, run, branches), markup=False, soft_wrap=True)
    with Interrupts() as interrupts, lock_run(run) as lock:
        check_not_queued(run)
        clear_stop(run)
        code, job = prepare(job, run / "job.yaml", interrupts)
        if code:
            return code
        check_same_data(checkpoint, job.data.prepared)
        _set_up(run, folder, job, branches)
        if len(_results(folder, branches)) < len(branches.seeds) * len(branches.configurations):
            outcome = attend(engine, folder, job, lock, interrupts, console)
            if outcome.exit_code or outcome.reason != "finished":
                return _say_unfinished(outcome, run, console)
    calibration = _analyse(checkpoint, branches, _results(folder, branches), tolerance)
    path = run / "calibration.json"
    write_atomically(path, calibration.model_dump_json(indent=2) + "\n")
    if as_json:
        print(as_json_line({"calibration": str(path), **calibration.model_dump(mode="json")}))
    else:
        _print(calibration, path, job)
    return 0


def _multiples(text: str) -> list[float]:
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise JobError(f"--multiples {text}: expected numbers with commas between, such as 1,2,4,8") from None
    if len(values) < 2 or values[0] <= 0 or not math.isfinite(values[-1]):
        raise JobError(f"--multiples {text}: expected two or more different positive numbers")
    return values


def _plan(job: JobConfig, checkpoint: Path, multiples: list[float], tokens: int | None, orders: int) -> Branches:
    """What is run. Raises JobError, with the arithmetic, for batches that cannot be."""
    if orders < 1:
        raise JobError(f"--orders {orders}: at least 1")
    if tokens is not None and tokens < 1:
        raise JobError(f"--tokens {tokens}: at least 1")
    base = Configuration.model_validate(json.loads((checkpoint / "trainer.json").read_text())["configuration"])
    configurations = [_scaled(base, multiple) for multiple in multiples]
    common = math.lcm(*(configuration.global_batch for configuration in configurations))
    largest = configurations[-1].global_batch
    wanted = SHORTEST * largest if tokens is None else tokens // job.model.seq_len
    sequences = max(1, math.ceil(wanted / common)) * common
    seeds = [job.training.seed + order for order in range(orders)]
    return Branches(
        checkpoint=checkpoint,
        checkpoint_digest=hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:16],
        configurations=configurations,
        seeds=seeds,
        sequences=sequences,
    )


def _scaled(base: Configuration, multiple: float) -> Configuration:
    """The same layout at `multiple` times the global batch, with the largest micro-batch that is no larger and fits."""
    batch = base.global_batch * multiple
    where = f"--multiples {multiple:g}: {multiple:g} × batch {base.global_batch} of the checkpoint = {batch:g}"
    if batch != int(batch):
        raise JobError(f"{where}, which is not whole")
    dp = base.layout.dp
    per_replica, rest = divmod(int(batch), dp)
    if rest:
        raise JobError(f"{where}, which {dp} replicas cannot share")
    micro_batch = max(size for size in range(1, min(base.micro_batch, per_replica) + 1) if per_replica % size == 0)
    try:
        return Configuration(layout=base.layout, micro_batch=micro_batch, global_batch=int(batch))
    except ValidationError as error:
        raise JobError(f"{where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _announcement(job: JobConfig, run: Path, branches: Branches) -> str:
    batches = ", ".join(str(configuration.global_batch) for configuration in branches.configurations)
    number = len(branches.configurations) * len(branches.seeds)
    tokens = branches.sequences * job.model.seq_len
    return (
        f"{shown(run)}: {number} branches from {branches.checkpoint.name}: batches {batches}, {len(branches.seeds)} "
        f"orders of the data, {count(tokens)} tokens each, {count(number * tokens)} in all"
    )


def _set_up(run: Path, folder: Path, job: JobConfig, branches: Branches) -> None:
    """Make the calibration's run directory. The results of another job, or of another checkpoint, are removed from it.

    Its workers stop when the run is asked to: `copus cancel` takes the run.
    """
    if (folder / "job.yaml").is_file() and not _goes_on(folder, job, branches):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_job(folder, job)
    write_atomically(plan_path(folder), plan_text(branches))
    clear_stop(folder)
    (folder / "stop").symlink_to(run / "stop")


def _goes_on(folder: Path, job: JobConfig, branches: Branches) -> bool:
    """Whether the results in a calibration's folder are of this job and this checkpoint. Where it runs, and who is told
    of it, changes no result."""
    try:
        before, plan = load_job(folder / "job.yaml"), read_plan(folder)
    except (JobError, ValueError):
        return False
    same_job = before.model_dump(exclude=PLACES) == job.model_dump(exclude=PLACES)
    return same_job and plan is not None and plan.checkpoint_digest == branches.checkpoint_digest


def _results(folder: Path, branches: Branches) -> dict[tuple[Configuration, int], Branch]:
    """The branches of this plan that were run, by configuration and order."""
    return {
        (event.configuration, event.seed): event
        for event in read_events(folder)
        if isinstance(event, Branch)
        and event.configuration in branches.configurations
        and event.seed in branches.seeds
        and event.sequences == branches.sequences
    }


def _analyse(
    checkpoint: Path, branches: Branches, results: dict[tuple[Configuration, int], Branch], tolerance: float
) -> Calibration:
    """Fit the losses. Raises JobError if there are fewer than two batches whose losses are finite."""
    import numpy as np

    from planner.calibration import combine_factor, fit_critical_batch, largest_within

    columns: dict[int, list[float]] = {}
    diverged = []
    for configuration in branches.configurations:
        ends = [results[configuration, seed].last_loss for seed in branches.seeds]
        finite = [loss for loss in ends if loss is not None]
        if len(finite) == len(ends):
            columns[configuration.global_batch] = finite
        else:
            diverged.append(configuration.global_batch)
    one = next(iter(results.values()))
    if len(columns) < 2 or one.first_loss is None:
        raise JobError(f"{checkpoint.name}: fewer than two batches had finite losses; nothing can be fitted")
    batches, losses = np.array(list(columns)), np.array(list(columns.values())).T
    fit = fit_critical_batch(batches, losses, one.first_loss)
    noise = one.noise
    factor, low, high = combine_factor(fit, noise)
    return Calibration(
        critical_batch_factor=factor,
        factor_low=low,
        factor_high=high,
        critical_batch=fit.value,
        critical_low=fit.low,
        critical_high=fit.high,
        noise_scale=noise.value,
        noise_low=noise.low,
        noise_high=noise.high,
        within_tolerance=largest_within(batches, losses, tolerance),
        tolerance=tolerance,
        checkpoint=checkpoint.name,
        samples_consumed=one.samples_consumed,
        sequences=branches.sequences,
        first_loss=one.first_loss,
        batches=list(columns),
        losses=losses.tolist(),
        residual=fit.residual,
        diverged=diverged,
    )


def _say_unfinished(outcome: Outcome, run: Path, console: Console) -> int:
    if outcome.reason != "failed":  # which has been explained
        console.print(
            f"stopped after {duration(outcome.seconds)}; the same command goes on after the last whole branch of "
            f"{shown(run)}",
            markup=False,
            soft_wrap=True,
        )
    return outcome.exit_code or 1


def _print(result: Calibration, path: Path, job: JobConfig) -> None:
    lines = [f"{'batch':>8}  {'loss':>8}  {'± order':>8}  (held out; {result.first_loss:.4f} at {result.checkpoint})"]
    for index, batch in enumerate(result.batches):
        column = [row[index] for row in result.losses]
        mean = sum(column) / len(column)
        spread = math.sqrt(sum((loss - mean) ** 2 for loss in column) / max(len(column) - 1, 1))
        lines.append(f"{batch:>8}  {mean:>8.4f}  {spread:>8.4f}")
    lines += [f"{batch:>8}  the loss was not finite" for batch in result.diverged]
    critical = _interval(result.critical_batch, result.critical_low, result.critical_high)
    lines += [
        f"critical batch    φ = {critical} sequences",
        f"noise scale       B_simple = {_interval(result.noise_scale, result.noise_low, result.noise_high)} sequences",
        f"factor            c = {_interval(result.critical_batch_factor, result.factor_low, result.factor_high)}",
        f"without a model   batch {result.within_tolerance:g} is the largest within {result.tolerance:g} nats of the "
        "smallest",
    ]
    if result.noise_scale is None:
        lines.append("the noise scale was unknown at this checkpoint: c cannot be told")
    elif result.critical_batch_factor is None:
        lines.append("the largest batch learned as much per token as the smallest: try larger multiples")
    else:
        lines += [
            f"to use it, in the job file (it has {job.planner.critical_batch_factor:g}):",
            f"  planner: {{critical_batch_factor: {three_digits(result.critical_batch_factor)}}}",
            f"or --set planner.critical_batch_factor={shown(path)}",
        ]
    print("\n".join(lines))


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    """`14.2 (10.1–19.8)`; an open end is ∞."""
    if value is None:
        return "unknown" if low is None else f"unknown, above {three_digits(low)}"
    if low is None and high is None:
        return f"{three_digits(value)} (no interval)"
    ends = ("0" if low is None else three_digits(low), "∞" if high is None else three_digits(high))
    return f"{three_digits(value)} ({'–'.join(ends)})"
