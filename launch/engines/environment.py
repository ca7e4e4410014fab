"""The environment of the shell that submits, less what belongs to another job or overrides this one's job file."""

import os

JOB_PREFIXES = ("PET_", "TORCHELASTIC_", "COPUS_")
JOB_NAMES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}
"""What torch's agents, their schedulers and copus itself set for the workers of one job. A shell has them if copus is
called from another job: the new job's agents would take them for their own."""
SLURM_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCONTROL_", "SCANCEL_")
"""Options of Slurm's programs. They outrank the `#SBATCH` lines of a script, and so the job file."""
SLURM_CLIENT = ("SLURM_CONF", "SLURM_JWT", "SLURM_SACK")
"""Beginnings of those among them that only say where Slurm's controller is, and who asks."""


def job_environment() -> dict[str, str]:
    """This process's environment without what belongs to the workers of another job."""
    return {
        name: value for name, value in os.environ.items() if name not in JOB_NAMES and not name.startswith(JOB_PREFIXES)
    }


def slurm_environment() -> dict[str, str]:
    """The same without the options of Slurm's programs: what they are called with is all that counts."""
    return {
        name: value
        for name, value in job_environment().items()
        if name.startswith(SLURM_CLIENT) or not name.startswith(SLURM_PREFIXES)
    }
