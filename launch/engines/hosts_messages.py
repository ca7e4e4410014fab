"""What the supervisor of a job (`hosts_job`) and the process on each host (`hosts_node`) tell each other: JSON lines.

Orders go to the host's stdin, reports come from its stdout.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from copus.rendezvous import Rendezvous
from profiles.record import Record

STANDBY = -1
BEAT_SECONDS = 1.0
"""Time between two signs of life, in all directions."""


class Interface(Record):
    """An address of a host."""

    name: str
    """`eth0`."""
    address: str
    """IPv4."""
    network: str
    """The network that it is in, as 10.0.0.0/24."""
    mbit_per_second: int
    """What the interface says of itself; 0 if it does not."""


class Hello(Record):
    """The process is there."""

    kind: Literal["hello"] = "hello"
    software: dict[str, str]
    """Versions of what has to be the same everywhere, by name."""
    digests: list[str | None]
    """Of the files that it was asked for, in hexadecimal; None for one that is not there."""
    interfaces: list[Interface]
    """All that are up, but for loopback."""


class Bound(Record):
    """It listens to the others."""

    kind: Literal["bound"] = "bound"
    port: int
    """UDP, on the address of the order."""


class Alive(Record):
    """A sign of life."""

    kind: Literal["alive"] = "alive"
    silent_seconds: dict[str, float | None]
    """By host: how long nothing was heard of it; None where nothing ever was."""
    is_standing_by: bool = False
    """Whether all workers have done their imports, and wait for the first world to join."""


class Ended(Record):
    """The agent of an attempt is gone, with its workers."""

    kind: Literal["ended"] = "ended"
    attempt: int
    code: int
    """Its exit code; below 0 for a signal."""


class Beat(Record):
    """A sign of life."""

    kind: Literal["beat"] = "beat"


class Bind(Record):
    """Listen to the others on this address."""

    kind: Literal["bind"] = "bind"
    address: str


class Watch(Record):
    """Exchange signs of life with these, and with no others."""

    kind: Literal["watch"] = "watch"
    peers: dict[str, tuple[str, int]]
    """Address and UDP port of each host."""


class Join(Record):
    """Have the workers of this host join a world: those that are there, or new ones."""

    kind: Literal["join"] = "join"
    rendezvous: Rendezvous | None
    """None: start them, and let them stand by."""
    keep: bool
    """Whether workers that are there stay, and leave the world that they are in; else they are ended."""
    workers: int
    """How many there are."""
    arguments: list[str]
    """Of `python -m copus.agent`."""
    environment: dict[str, str]
    """Beside the host's own."""
    log: str
    """File that its output is appended to."""


class Stop(Record):
    """SIGTERM to the agent: the workers stop with a checkpoint if they can."""

    kind: Literal["stop"] = "stop"


class Kill(Record):
    """End the agent and its workers at once."""

    kind: Literal["kill"] = "kill"


Order = Beat | Bind | Watch | Join | Stop | Kill
Report = Hello | Bound | Alive | Ended
ORDERS: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="kind")])
REPORTS: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])


def attempt_of(order: Join) -> int:
    """The attempt that workers are to join; `STANDBY` for those that join none yet."""
    return STANDBY if order.rendezvous is None else order.rendezvous.attempt
