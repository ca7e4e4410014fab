"""What the Slurm engine takes in `launch.options`."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from launch.engines.base import EngineOptions
from launch.engines.environment import EnvironmentName, check_variables

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:,@+=()/-]*$", max_length=200)]
"""A name as Slurm's administrators give them: nothing that a shell, or Slurm's own parser, takes for more than that."""
OURS = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "array", "wrap", "parsable"),
    *("requeue", "no-requeue", "signal", "chdir", "output", "error", "open-mode", "export"),
    *("partition", "account", "qos", "time", "gres", "gpus-per-node"),
)
"""Options of sbatch that are set from elsewhere."""
OURS_OF_SRUN = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "export", "mpi", "kill-on-bad-exit", "wait"),
    *("open-mode", "output", "error", "multi-prog", "pty"),
)
"""Options of srun that are set from elsewhere."""
ELSEWHERE = ("clusters", "cluster")
"""Options that would queue the job where `squeue` and `scancel` do not look for it."""


class StepOptions(EngineOptions):
    """What the agents need on the nodes, whoever asked for these."""

    cpus_per_node: PositiveInt | None = None
    """CPUs of a node; else ranks on the node × launch.threads_per_rank, on GPUs at least the share of the node's CPUs
    that Slurm tells for each (8 where it tells none). In an allocation that is there all that it has on the node."""
    srun: dict[str, str | int | bool] = Field(default_factory=dict)
    """Options of the `srun` that starts the agents, by their long names: {container-image: copus.sqsh, cpu-bind: none}.
    """
    wrapper: list[str] = Field(default_factory=list)
    """Words before the command of each node, as [nsys, profile, -o, "trace-%q{SLURM_NODEID}"]."""
    container_python: str | None = None
    """Python in the containers that `srun` starts ({container-image: …}), with what copus needs: an absolute path, or a
    name on their PATH; else that of the machine, which then has to be in them."""
    env: dict[EnvironmentName, str] = Field(default_factory=dict)
    """Environment variables of the job. No secrets: they would stand in the run directory."""
    interface: Word | None = None
    """Network interface that gloo and NCCL connect the nodes by, as `ib0`; else gloo takes the one that leads to the
    other nodes, and NCCL chooses."""
    nccl_interface: str | None = Field(default=None, pattern=r"^[\^=]?[A-Za-z0-9][A-Za-z0-9._,-]*$", max_length=200)
    """NCCL's own, in its syntax, if it differs: `=ib0,ib1`, or `^docker0,lo` for all but those."""
    port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the first node that the agents meet at; else one that follows from the job's id."""

    @field_validator("srun")
    @classmethod
    def _of_srun(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name, setting in value.items():
            _check_long_option("srun", name, OURS_OF_SRUN)
            if not str(setting).isprintable():
                raise ValueError(f"srun.{name}: a value with control characters: {setting!r}")
        return value

    @field_validator("env")
    @classmethod
    def _checked(cls, value: dict[str, str]) -> dict[str, str]:
        check_variables(value, "set it in the shell that submits, which Slurm hands on")
        return value

    @model_validator(mode="after")
    def _interfaces_once(self) -> "StepOptions":
        for name, value in (("interface", self.interface), ("nccl_interface", self.nccl_interface)):
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")[name == "nccl_interface" :]:
                if value and variable in self.env:
                    raise ValueError(f"{name}({value}) and env.{variable}({self.env[variable]}) ask for the same")
        return self

    @field_validator("wrapper")
    @classmethod
    def _printable(cls, value: list[str]) -> list[str]:
        return _one_line(value)

    @field_validator("container_python")
    @classmethod
    def _in_containers(cls, value: str | None) -> str | None:
        return value if value is None else _interpreter(value)


class SlurmOptions(StepOptions):
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
    gpus: Literal["gres", "gpus-per-node", "none"] = "gres"
    """How the GPUs of a node are asked for: `--gres=gpu:N`, `--gpus-per-node=N`, or not at all, if whole nodes are
    given out or the partition implies them."""
    gres: Word | None = None
    """Generic resources of a node, as `gpu:h100:8`, in the place of what `gpus` asks for."""
    memory: Word | int | None = None
    """Memory of a node as sbatch's `--mem` reads it: 64G, or 0 for all of it; else the cluster's default, which often
    follows the CPUs."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Other options of sbatch by their long names: {constraint: a100, exclusive: true}."""
    setup: list[str] = Field(default_factory=list)
    """Shell commands that the batch script runs first: module load …, source …/activate. The only field that is run
    as it stands."""
    python: str | None = None
    """Python on the nodes, with what copus needs: an absolute path, or a name on their PATH; else the one that
    submits."""

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
            _check_long_option("sbatch", name, OURS)
            if name in ELSEWHERE:
                raise ValueError(f"{name}: jobs are queued, watched and cancelled on this machine's own cluster only")
            check_directive(f"sbatch.{name}", str(setting))
        return value

    @model_validator(mode="after")
    def _said_once(self) -> "SlurmOptions":
        if self.memory is not None and "mem" in self.sbatch:
            raise ValueError(f"memory({self.memory}) and sbatch.mem({self.sbatch['mem']}) ask for the same")
        if self.gres is not None and self.gpus != "gres":
            raise ValueError(f"gres({self.gres}) and gpus({self.gpus}) ask for the same")
        return self

    @field_validator("python")
    @classmethod
    def _on_nodes(cls, value: str | None) -> str | None:
        return value if value is None else _interpreter(value)

    @field_validator("setup")
    @classmethod
    def _printable_lines(cls, value: list[str]) -> list[str]:
        return _one_line(value)


def _interpreter(value: str) -> str:
    if "/" in value and not value.startswith("/"):
        raise ValueError(f"{value!r} is neither an absolute path nor a name on PATH")
    return _one_line([value])[0]


def _one_line(value: list[str]) -> list[str]:
    for line in value:
        if not line.isprintable():
            raise ValueError(f"a line with control characters: {line!r}")
    return value


def _check_long_option(program: str, name: str, ours: tuple[str, ...]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"{name!r} is no long option of {program}")
    if name in ours:
        raise ValueError(f"{name} is set by COPUS or by a field of its own")


def check_directive(where: str, text: str) -> None:
    """Raise ValueError for what cannot stand between quotes in an #SBATCH line, or would be expanded there."""
    bad = next((letter for letter in text if letter in "\"'\\%`$#" or not letter.isprintable()), None)
    if bad is not None:
        raise ValueError(f"{where}({text!r}): {bad!r} cannot stand in an option of sbatch")
