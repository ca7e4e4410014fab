"""The environment of a job: what of the submitting shell's reaches it, and what a job file may add."""

import os
from collections.abc import Collection
from typing import Annotated

from pydantic import Field

from copus.secret_names import is_secret

EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of a variable in a job file."""

JOB_PREFIXES = ("PET_", "TORCHELASTIC_", "COPUS_", "OMPI_COMM_WORLD_")
JOB_NAMES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}
"""What torch's agents, mpirun, their schedulers and copus itself set for the workers of one job. A shell has them if
copus is called from another job: the new job's agents, or DeepSpeed, would take them for their own."""
SLURM_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCONTROL_", "SCANCEL_")
"""Options of Slurm's programs. They outrank the `#SBATCH` lines of a script, and so the job file."""
SLURM_CLIENT = ("SLURM_CONF", "SLURM_JWT", "SLURM_SACK")
"""Beginnings of those among them that only say where Slurm's controller is, and who asks."""


THREADS = "OMP_NUM_THREADS"
"""What `launch.threads_per_rank` becomes."""


def check_names(names: Collection[str]) -> None:
    """Raise ValueError if one of these variables has a field of its own, or belongs to the agents that start workers:
    it would be overridden."""
    for name in names:
        if name == THREADS:
            raise ValueError(f"{name} would be overridden: set launch.threads_per_rank")
        if belongs_to_a_job(name):
            raise ValueError(f"{name} would be overridden: what starts the workers sets it")


def check_variables(names: Collection[str], instead: str) -> None:
    """The same, and for a secret: a job file must not hold its value. `instead` says where that belongs."""
    check_names(names)
    for name in names:
        if is_secret(name):
            raise ValueError(f"{name} looks like a secret: {instead.format(name=name)}")


def belongs_to_a_job(name: str) -> bool:
    """Whether a variable is one of those that are set for the workers of one job."""
    return name in JOB_NAMES or name.startswith(JOB_PREFIXES)


def job_environment() -> dict[str, str]:
    """This process's environment without what belongs to the workers of another job."""
    return {name: value for name, value in os.environ.items() if not belongs_to_a_job(name)}


def slurm_environment() -> dict[str, str]:
    """The same without the options of Slurm's programs: what they are called with is all that counts."""
    return {
        name: value
        for name, value in job_environment().items()
        if name.startswith(SLURM_CLIENT) or not name.startswith(SLURM_PREFIXES)
    }
