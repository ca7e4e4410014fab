"""What the hosts engine takes in `launch.options`."""

import ipaddress
from typing import Annotated

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from launch.engines.base import EngineOptions
from launch.engines.environment import EnvironmentName, check_names, check_variables

HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._@:-]*[A-Za-z0-9])?$", max_length=200)]
"""A name, an address, or `user@host`: nothing that ssh takes for an option."""
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "{host}", "{command}")


class HostsOptions(EngineOptions):
    """Which machines there are, and how they are reached."""

    hosts: list[HostName] = Field(min_length=1)
    """Machines as ssh knows them. The job runs on the first `cluster.nodes` of them that can reach each other; the
    others are spares."""
    command: list[str] = Field(default=list(SSH))
    """What runs a command on a machine, a word at a time. `{host}` stands for the machine, `{command}` for the command,
    quoted for a shell: [ssh, "{host}", "{command}"]. It has to hand stdin and stdout through."""
    min_hosts: PositiveInt = 1
    """Fewest machines that the job goes on with; with fewer it waits."""
    wait_seconds: float = Field(default=600.0, gt=0, le=30 * 86_400)
    """How long it waits for machines before it fails."""
    lost_seconds: float = Field(default=30.0, ge=5, le=3600)
    """A machine that has been silent for this long is lost."""
    network: str | None = None
    """Network that the machines talk over, as 10.1.0.0/16; else the fastest that all of them have an address in."""
    nccl_interface: str | None = Field(default=None, pattern=r"^[\^=]?[A-Za-z0-9][A-Za-z0-9._,-]*$", max_length=200)
    """NCCL_SOCKET_IFNAME, in NCCL's syntax, if it is not to be the interface of `network`."""
    port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the first machine that the ranks meet at; else one from 18000 to 29999, anew at every start."""
    env: dict[EnvironmentName, str] = Field(default_factory=dict)
    """Environment variables of the workers. No secrets: they would stand in the run directory."""
    pass_env: list[EnvironmentName] = Field(default_factory=list)
    """Variables that the workers get as they are in the shell that submits, as WANDB_API_KEY. They are written nowhere.
    """
    python: str | None = None
    """Python on the machines, with what copus needs: an absolute path, or a name on their PATH; else the one that
    submits."""

    @field_validator("hosts")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        twice = next((name for name in value if value.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} stands there twice")
        return value

    @field_validator("command")
    @classmethod
    def _a_template(cls, value: list[str]) -> list[str]:
        if "{command}" not in value:
            raise ValueError("{command} has to be one of its words")
        if not any("{host}" in word for word in value):
            raise ValueError("{host} has to stand in one of its words")
        return value

    @field_validator("network")
    @classmethod
    def _a_network(cls, value: str | None) -> str | None:
        if value is not None:
            ipaddress.IPv4Network(value)
        return value

    @field_validator("env")
    @classmethod
    def _checked(cls, value: dict[str, str]) -> dict[str, str]:
        check_variables(value, "set it in the shell that submits, and name it in pass_env")
        return value

    @field_validator("pass_env")
    @classmethod
    def _not_overridden(cls, value: list[str], info: ValidationInfo) -> list[str]:
        check_names(value)
        for name in value:
            if name in info.data.get("env", {}):
                raise ValueError(f"{name} is in env too")
        return value

    @field_validator("python")
    @classmethod
    def _from_anywhere(cls, value: str | None) -> str | None:
        if value is not None and "/" in value and not value.startswith("/"):
            raise ValueError(f"{value!r} is neither an absolute path nor a name on PATH")
        return value

    @model_validator(mode="after")
    def _enough(self) -> "HostsOptions":
        if self.min_hosts > len(self.hosts):
            raise ValueError(f"min_hosts({self.min_hosts}) is more than the {len(self.hosts)} of hosts")
        return self

    @model_validator(mode="after")
    def _interface_once(self) -> "HostsOptions":
        if self.nccl_interface is not None and "NCCL_SOCKET_IFNAME" in [*self.env, *self.pass_env]:
            raise ValueError(
                f"nccl_interface({self.nccl_interface}) and NCCL_SOCKET_IFNAME of env or pass_env ask for the same"
            )
        return self
