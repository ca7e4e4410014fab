"""What the Slurm engine takes in `launch.options`."""

import re
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from launch.engines.base import EngineOptions

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:,@+=()/-]*$", max_length=200)]
"""A name as Slurm's administrators give them: nothing that a shell, or Slurm's own parser, takes for more than that."""
OURS = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "array", "wrap", "parsable"),
    *("requeue", "no-requeue", "signal", "chdir", "output", "error", "open-mode", "export"),
    *("partition", "account", "qos", "time", "gres"),
)
"""Options of sbatch that are set from elsewhere."""
ELSEWHERE = ("clusters", "cluster")
"""Options that would queue the job where `squeue` and `scancel` do not look for it."""


class SlurmOptions(EngineOptions):
    """How the job is queued, and what it needs on its nodes."""

    partition: Word | None = None
    """Partition, or several with commas between."""
    account: Word | None = None
    """Account that pays."""
    qos: Word | None = None
    """Quality of service."""
    time_limit: str | None = Field(default=None, pattern=r"^(\d+-)?\d+(:\d{1,2}){0,2}$")
    """Time limit of an attempt as Slurm reads it: "4:00:00", "2-00:00:00", "90" minutes; else the partition's."""
    checkpoint_seconds: PositiveInt = 120
    """The workers are asked for a checkpoint this long before the time limit, and the job goes back into the queue."""
    max_requeues: NonNegativeInt = 3
    """Requeues in a row without a new checkpoint after which the job fails for good."""
    gres: Word | None = None
    """Generic resources of a node, as `gpu:h100:8`; else `gpu:N` for N accelerators a node that are no CPU cores."""
    cpus_per_node: PositiveInt | None = None
    """CPUs of a node; else ranks on the node × launch.threads_per_rank, on GPUs at least 8 for each."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Other options of sbatch by their long names: {constraint: a100, exclusive: true}."""
    setup: list[str] = Field(default_factory=list)
    """Shell commands that the batch script runs first: module load …, source …/activate. The only field that is run
    as it stands."""
    python: str | None = None
    """Python on the nodes, with what copus needs: an absolute path, or a name on their PATH; else the one that
    submits."""
    interface: Word | None = None
    """Network interface that gloo and NCCL connect the nodes by, as `ib0`; else they choose."""
    port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the first node that the agents meet at; else one that follows from the job's id."""

    @field_validator("time_limit", mode="before")
    @classmethod
    def _not_sexagesimal(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(f'{value} is a number: put it in quotes ("4:00:00" without them is 14400 in YAML)')
        return value

    @field_validator("sbatch")
    @classmethod
    def _of_sbatch(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name, setting in value.items():
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ValueError(f"{name!r} is no long option of sbatch")
            if name in OURS:
                raise ValueError(f"{name} is set by COPUS or by a field of its own")
            if name in ELSEWHERE:
                raise ValueError(f"{name}: jobs are queued, watched and cancelled on this machine's own cluster only")
            check_directive(f"sbatch.{name}", str(setting))
        return value

    @field_validator("python")
    @classmethod
    def _from_anywhere(cls, value: str | None) -> str | None:
        if value is not None and "/" in value and not value.startswith("/"):
            raise ValueError(f"{value!r} is neither an absolute path nor a name on PATH")
        return value

    @field_validator("setup", "python")
    @classmethod
    def _one_line(cls, value: list[str] | str | None) -> list[str] | str | None:
        for line in value if isinstance(value, list) else [value or ""]:
            if not line.isprintable():
                raise ValueError(f"a line with control characters: {line!r}")
        return value


def check_directive(where: str, text: str) -> None:
    """Raise ValueError for what cannot stand between quotes in an #SBATCH line, or would be expanded there."""
    bad = next((letter for letter in text if letter in "\"'\\%`$#" or not letter.isprintable()), None)
    if bad is not None:
        raise ValueError(f"{where}({text!r}): {bad!r} cannot stand in an option of sbatch")
