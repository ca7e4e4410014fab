"""Branches: short stretches of training from one checkpoint on, at several batches. What they are, without torch."""

from pathlib import Path

from copus.job import JobConfig
from profiles.configuration import Configuration
from profiles.record import PositiveInt, Record

_FILE = "branches.json"


class Branches(Record):
    """The plan of a calibration. A run directory that holds one is a calibration: its workers run the branches."""

    checkpoint: Path
    """Where every branch begins."""
    checkpoint_digest: str
    """Hash of that checkpoint's manifest: another checkpoint of the same name makes another calibration."""
    configurations: list[Configuration]
    """What is compared: one layout, several global batches."""
    seeds: list[int]
    """Orders of the data; the first is the run's own, which goes on with text that the run has not seen."""
    sequences: PositiveInt
    """Length of every branch: a multiple of every global batch."""


def plan_text(branches: Branches) -> str:
    """What `branches.json` holds."""
    return branches.model_dump_json(indent=2)


def plan_path(run: Path) -> Path:
    """Where the plan of a calibration is."""
    return run / _FILE


def read_plan(run: Path) -> Branches | None:
    """The plan of a calibration; None for an ordinary run. Raises ValueError for one that this version cannot read."""
    path = plan_path(run)
    return Branches.model_validate_json(path.read_bytes()) if path.exists() else None


def branch_job(job: JobConfig, samples_consumed: int, sequences: int, lr: float, seed: int) -> JobConfig:
    """The job of one branch: `sequences` more after `samples_consumed`, in the order of `seed`, at a constant `lr`.

    `lr` is that of the reference batch: batches scale it, and β2, by the rules of the job (√κ unless told otherwise).
    It is evaluated at both ends alone.
    """
    tokens = (samples_consumed + sequences) * job.model.seq_len
    training = job.training.model_copy(
        update={
            "tokens": tokens,
            "seed": seed,
            "lr": lr,
            "min_lr": min(job.training.min_lr, lr),
            "warmup_tokens": 0,
            "decay": "constant",
            "decay_tokens": None,
            "decay_shape": None,
            "reference_batch": job.reference_batch,
            "max_minutes": None,
            "target_loss": None,
            "evaluate_every_tokens": tokens,
            "checkpoint_every_tokens": None,
            "checkpoint_every_minutes": None,
        }
    )
    most_steps = sequences  # of one sequence each
    planner = job.planner.model_copy(update={"min_noise_samples": 1, "noise_every_steps": most_steps})
    return job.model_copy(update={"training": training, "planner": planner})
