"""Slurm's own programs: asked, and understood."""

import re
import subprocess
from dataclasses import dataclass

from copus.job import JobError
from launch.engines.environment import slurm_environment

ANSWER_SECONDS = 10.0
"""How long Slurm's controller may take to answer."""
ALIVE = {
    "PENDING": "waits",
    "REQUEUED": "waits",
    "REQUEUE_FED": "waits",
    "REQUEUE_HOLD": "is held in the queue",
    "RESV_DEL_HOLD": "is held in the queue",
    "SPECIAL_EXIT": "is held in the queue",
    "CONFIGURING": "gets its nodes ready",
    "RUNNING": "runs",
    "SUSPENDED": "is suspended",
    "STOPPED": "is stopped",
    "SIGNALING": "is signalled",
    "RESIZING": "is resized",
    "STAGE_OUT": "is ending",
    "COMPLETING": "is ending",
}
"""States that a job leaves again, in words. All others are ends."""
QUEUED = ("waits", "is held in the queue")


@dataclass(frozen=True)
class QueueEntry:
    """A job as `squeue` shows it."""

    state: str
    """PENDING, RUNNING, COMPLETING, …: `ALIVE`, or how it ended."""
    reason: str
    """Why it waits; `None` where it does not."""
    nodes: str
    """Its nodes as Slurm abbreviates them; empty while it waits."""


def slurm(program: str, *arguments: str) -> str:
    """Run one of Slurm's programs, with no options but these, and return what it prints. Raises JobError with the
    program's own words if it fails."""
    try:
        done = subprocess.run(
            [program, *arguments],
            env=slurm_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
        )
    except FileNotFoundError:
        raise JobError(f"launch.engine(slurm): {program} is not on the PATH of this machine") from None
    except subprocess.TimeoutExpired:
        raise JobError(f"launch.engine(slurm): {program} did not answer in {ANSWER_SECONDS:g} s") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise JobError(said if said.startswith(f"{program}:") else f"{program}: {said}")
    return done.stdout


def queue_entry(job_id: str) -> QueueEntry | None:
    """The job in Slurm's queue; None when Slurm has forgotten it, some minutes after its end. Raises JobError."""
    try:
        text = slurm("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%r|%N")
    except JobError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    lines = text.splitlines()
    return QueueEntry(*(part.strip() for part in lines[0].split("|", 2))) if lines else None


def cpus_per_gpu(partition: str | None) -> int | None:
    """CPUs of a node for each of its GPUs, the fewest that a partition has (None: the one that Slurm takes by itself);
    None where it has no GPUs, or Slurm does not say."""
    place = [] if partition is None else [f"--partition={partition}"]
    try:
        text = slurm("sinfo", "--noheader", "--exact", "--format=%P|%c|%G", *place)
    except JobError:
        return None
    shares = []
    for line in text.splitlines():
        name, cpus, resources = line.split("|", 2)
        gpus = sum(map(int, re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", resources)))
        if gpus and (partition is not None or name.endswith("*")):
            shares.append(int(cpus.rstrip("+")) // gpus)
    return min(shares, default=0) or None


def node_addresses(nodes: str) -> dict[str, str]:
    """Name → address by which Slurm itself reaches it, of nodes as Slurm abbreviates them. Raises JobError."""
    text = slurm("scontrol", "show", "--oneliner", "node", nodes)
    return dict(re.findall(r"^NodeName=(\S+) .*?\bNodeAddr=(\S+)", text, flags=re.MULTILINE))
