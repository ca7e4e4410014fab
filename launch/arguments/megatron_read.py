"""Megatron-LM's arguments as a job file. What is not given has Megatron-LM's default, and that is written out."""

import re
from pathlib import PurePath

from launch.arguments.command_line import CommandLine
from launch.arguments.given_arguments import GivenArguments
from launch.arguments.imported_job import ImportedJob
from launch.arguments.megatron_layout import read_layout
from launch.arguments.megatron_model import read_model
from launch.arguments.megatron_training import Training
from launch.arguments.megatron_unmapped import unmapped

_OTHER_NAMES = {
    "--layernorm-epsilon": "--norm-epsilon",
    "--encoder-num-layers": "--num-layers",
    "--encoder-seq-length": "--seq-length",
    "--persistent-save-interval": "--save-interval",
}
"""Former and second names."""


def job_of_megatron(command: CommandLine) -> ImportedJob:
    """The job file for Megatron-LM's arguments.

    Raises JobError for a value that is not of its argument's type, and if an argument is missing that a job needs.
    """
    job = ImportedJob(notes=list(command.notes))
    command.arguments = {_OTHER_NAMES.get(name, name): values for name, values in command.arguments.items()}
    given = GivenArguments(command, job)
    job.put("name", _name(given.text("--wandb-exp-name") or "", PurePath(command.program).stem, "gpt"))
    read_model(given)
    training = Training(given, read_layout(given, command))
    training.read_learning_rate()
    training.read_optimizer()
    training.read_data()
    training.read_looking()
    given.finish(unmapped)
    return job


def _name(*candidates: str) -> str:
    """The first of these that is a name of a job, once other characters are dashes."""
    names = (re.sub(r"[^A-Za-z0-9._-]+", "-", candidate).strip("-._")[:64] for candidate in candidates)
    return next(name for name in names if name)
