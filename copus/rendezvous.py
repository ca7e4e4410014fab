"""Where the ranks of a host meet those of the others, if they outlive the world that they are in.

An engine that can tell which hosts are there (`launch.engines.hosts`) has a file on each of them, for the workers of
that host: where to meet, as which ranks, of how many. When a host is lost or comes back it writes the next rendezvous
there. `copus.worlds` is what a worker does then.
"""

import os
from pathlib import Path

from pydantic import ValidationError

from copus.durable import write_atomically
from profiles.record import NonNegativeInt, PositiveInt, Record

FILE = "COPUS_RENDEZVOUS"
"""Environment variable with the path of the file; without it a rank has one world, which it ends with."""
WAIT = "COPUS_RENDEZVOUS_SECONDS"
"""Environment variable: how long a rank that has lost its world waits for the next rendezvous."""


class Rendezvous(Record):
    """A world, as one host sees it."""

    token: str
    """Of the attempt (`copus.fencing`)."""
    attempt: NonNegativeInt
    address: str
    """Of the first host, on which rank 0 opens a store."""
    port: PositiveInt
    first_rank: NonNegativeInt
    """Rank of this host's first worker."""
    ranks: PositiveInt
    """In the whole world."""
    addresses: tuple[str, ...]
    """Of all hosts in it."""


def write_rendezvous(file: Path, rendezvous: Rendezvous) -> None:
    """Make it the newest of a host."""
    write_atomically(file, rendezvous.model_dump_json())


def clear_rendezvous(file: Path) -> None:
    """Forget what earlier workers of a host had there."""
    for path in (file, *_waiting(file)):
        path.unlink(missing_ok=True)


def note_waiting(local_rank: int) -> None:
    """Say that a worker has nothing left to do but to wait for its first rendezvous."""
    Path(f"{os.environ[FILE]}.{local_rank}").touch()


def count_waiting(file: Path) -> int:
    """How many workers of a host wait for its first rendezvous; 0 as soon as there is one."""
    return 0 if file.exists() else len(_waiting(file))


def _waiting(file: Path) -> list[Path]:
    return list(file.parent.glob(f"{file.name}.[0-9]*"))


def read_rendezvous() -> Rendezvous | None:
    """The newest of this host; None if there is none yet, or this process was given no file."""
    try:
        return Rendezvous.model_validate_json(Path(os.environ[FILE]).read_bytes())
    except (KeyError, FileNotFoundError, ValidationError):
        return None
