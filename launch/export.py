"""`copus export`: the weights of a run for other tools, written by a process of its own."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from copus.job import JobError, load_job
from launch.checkpoint import find_checkpoint
from launch.interrupts import Interrupts
from launch.json_output import as_json_line
from launch.process import python_module, run_module
from launch.run_directory import find_run


def export(
    run_text: str,
    folder: Path,
    to: Literal["hf", "megatron"],
    checkpoint_text: str | None,
    precision: Literal["bf16", "fp16", "fp32"] | None,
    *,
    as_json: bool = False,
) -> int:
    """Write a checkpoint of a run into a new folder, and print where. Raises JobError if something is there already."""
    run, folder = find_run(run_text), folder.expanduser().absolute()
    job = load_job(run / "job.yaml")
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise JobError(f"{folder} is there already: name a folder that is not, or remove it")
    checkpoint = find_checkpoint(run, checkpoint_text, Console(stderr=True, highlight=False))
    precision = precision or ("bf16" if job.training.has_bf16_weights else "fp32")
    with Interrupts() as interrupts:
        command = python_module("copus.weights", run, checkpoint, folder, to, precision)
        code = run_module(command, interrupts)
    if code == 0:
        said = {"folder": str(folder), "checkpoint": checkpoint.name, "dtype": precision}
        print(as_json_line(said) if as_json else folder)
    return code
