"""What `copus submit` says at the end: how the run ended, where it lies, and what looks at it."""

import shutil
import sys
from pathlib import Path

from rich.console import Console

from copus.audit import audit_run
from copus.checkpoints.files import FOLDER, checkpoint_names
from copus.events import has_checkpoint
from copus.job import JobConfig
from launch.attend import Outcome
from launch.audit import audit_lines
from launch.engines import engine_state
from launch.json_output import as_json_line
from launch.run_directory import shown, typed
from launch.status import RunStatus
from launch.wording import LIMITS, describe_limit
from profiles.formatting import count, duration, percent


def conclude(
    outcome: Outcome, run: Path, job: JobConfig, console: Console, *, as_json: bool, already: bool = False
) -> int:
    """Say how it ended, where the run lies, and what looks at it. Returns the exit code."""
    status, place = outcome.status, typed(run)
    resume = f"copus submit --resume {place}"
    audited = audit_run(run) if outcome.reason != "queued" and status.step else None
    if as_json:
        result = {
            "run": str(run),
            "reason": outcome.reason,
            "exit_code": outcome.exit_code,
            "samples_consumed": status.samples_consumed,
            "tokens": tokens_of(status),
            "loss": status.step.loss if status.step else None,
            "validation_loss": status.evaluation.loss if status.evaluation else None,
            "seconds": outcome.seconds,
            "audit": audited.model_dump(mode="json") if audited else None,
        }
        print(as_json_line(result))
        return outcome.exit_code
    if outcome.reason == "queued":
        console.print(_left_alone(run), markup=False, soft_wrap=True)
        return outcome.exit_code
    lines = [f"{shown(run)} finished already: {trained(status)}" if already else headline(outcome)]
    if status.skipped_steps:
        lines.append(f"  skipped     {status.skipped_steps} of {status.steps} steps: their gradients were not finite")
    if outcome.reason != "finished":
        newest = next(iter(checkpoint_names(run)), None)
        where = f"from {FOLDER}/{newest}" if newest else "from the start: there is no checkpoint"
        again = " --set training.lr=…" if outcome.reason == "diverged" else ""
        again += " --allow-from-scratch" if newest is None and has_checkpoint(run) else ""
        lines.append(f"  resume      {resume}{again}   ({where})")
    lines += [
        f"  run         {shown(run)}",
        f"  report      copus report {place}",
        f"  decisions   copus explain {place}",
    ]
    if "tensorboard" in job.tracking:
        lines.append(f"  curves      tensorboard --logdir {place}/tensorboard")
    if shutil.which("copus") is None:  # in an environment that is not activated
        lines.append(f"  copus       is {shown(Path(sys.argv[0]).absolute())}")
    if audited is not None:
        lines += audit_lines(audited)
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    return outcome.exit_code


def headline(outcome: Outcome) -> str:
    """How a run ended and what it was trained to, in a line."""
    status = outcome.status
    words = {
        "finished": f"finished in {duration(outcome.seconds)}",
        **{limit: f"stopped: {describe_limit(limit, status.start)}" for limit in LIMITS},
        "diverged": "ended, it diverged",
        "interrupted": "stopped",
        "killed": "ended at once",
        "failed": "the run failed",
    }[outcome.reason]
    return f"{words}: {trained(status)}"


def trained(status: RunStatus) -> str:
    """Tokens and losses."""
    return f"{count(tokens_of(status))} tokens{_losses(status)}"


def tokens_of(status: RunStatus) -> int:
    """Tokens that a run was trained on."""
    return status.samples_consumed * status.start.seq_len if status.start else 0


def _left_alone(run: Path) -> str:
    """Where to look at a job that goes on without this command."""
    place = typed(run)
    lines = [
        f"{engine_state(run).words}; it keeps running without this command",
        f"  run         {shown(run)}",
        f"  watch       copus watch {place}",
        f"  logs        copus logs {place} --follow",
        f"  stop        copus cancel {place}",
    ]
    return "\n".join(lines)


def _losses(status: RunStatus) -> str:
    text = f", loss {status.step.loss:.3f}" if status.step and status.step.loss is not None else ""
    first, last = status.first_evaluation, status.evaluation
    if last and last.loss is not None:
        text += f", validation loss {last.loss:.3f}"
        if status.start and last.samples_consumed < status.samples_consumed:
            text += f" at {count(last.samples_consumed * status.start.seq_len)}"
        if first and first is not last and first.loss:
            text += f" ({percent(last.loss / first.loss)} of the first one, {first.loss:.3f})"
    return text
