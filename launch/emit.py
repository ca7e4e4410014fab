"""`--emit TOOL`: a configuration as the arguments of another tool, ready to paste; what it cannot say, on stderr."""

import sys
from typing import TYPE_CHECKING, Literal, get_args

from copus.job import JobConfig, JobError
from copus.kernels import SCALED_BLOCK
from launch.fixed_run import FixedRun, best_fixed_run

if TYPE_CHECKING:  # numpy and scipy are loaded when the command runs
    from planner.job_estimate import JobEstimate

Tool = Literal["megatron", "megatron-0.17", "bridge", "torchtitan", "deepspeed", "accelerate"]
TOOLS: tuple[str, ...] = get_args(Tool)
"""megatron is Megatron-LM from 0.18 on; megatron-0.17 what came before."""
WITH_SCHEDULE = ("megatron", "megatron-0.17")
"""Tools whose batch may grow while they train."""


def check_tool(tool: str, beside: dict[str, bool]) -> None:
    """Raise JobError for a tool that nothing can be emitted for, and for options `beside` it, which may be given, that
    what is emitted has no place for."""
    if tool not in TOOLS:
        raise JobError(f"--emit {tool}: expected {', '.join(TOOLS[:-1])} or {TOOLS[-1]}")
    for option, is_given in beside.items():
        if is_given:
            raise JobError(f"--emit {tool} prints the arguments of that tool and nothing else: leave {option} out")


def emit(job: JobConfig, estimate: "JobEstimate", tool: str) -> None:
    """Print the best run that keeps its layout as a tool's arguments."""
    print_run(job, best_fixed_run(job, estimate, schedule=tool in WITH_SCHEDULE), tool)


def print_run(job: JobConfig, run: FixedRun, tool: str) -> None:
    """Print a run as a tool's arguments on stdout, and on stderr what they do not say."""
    text, lost = written(job, run, tool)
    print(text, end="")
    configurations = [configuration.label for configuration in run.configurations]
    print(
        f"# {tool}: {', then '.join(configurations[:1] + configurations[-1:] * (len(configurations) > 1))}",
        file=sys.stderr,
    )
    for note in run.notes:
        print(f"#   {note}", file=sys.stderr)
    if tool in ("deepspeed", "torchtitan") and job.training.backend == "megatron":
        backend = {"deepspeed": "deepspeed", "torchtitan": "fsdp"}[tool]
        print(f"#   planned for Megatron: --backend {backend} plans for what {tool} runs", file=sys.stderr)
    for sentence in lost:
        print(f"#   not said: {sentence}", file=sys.stderr)


def written(job: JobConfig, run: FixedRun, tool: str) -> tuple[str, list[str]]:
    """The text of a tool's arguments, and what they leave out."""
    text, lost = _written(job, run, tool)
    if job.training.precision in SCALED_BLOCK and tool not in WITH_SCHEDULE:
        lost = [*lost, f"training.precision({job.training.precision}): written as bf16"]
    return text, lost


def _written(job: JobConfig, run: FixedRun, tool: str) -> tuple[str, list[str]]:
    if tool == "megatron" or tool == "megatron-0.17":
        from launch.arguments.megatron_write import megatron_command

        return megatron_command(job, run, tool)  # type: ignore[arg-type]  # mypy does not narrow by `or`
    if tool == "bridge":
        from launch.arguments.bridge_write import bridge_command

        return bridge_command(job, run)
    if tool == "torchtitan":
        from launch.arguments.torchtitan_write import torchtitan_command

        return torchtitan_command(job, run)
    if tool == "deepspeed":
        from launch.arguments.deepspeed_write import deepspeed_configuration

        return deepspeed_configuration(job, run)
    from launch.arguments.accelerate_write import accelerate_configuration

    return accelerate_configuration(job, run)
