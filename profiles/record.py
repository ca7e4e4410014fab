"""The base of every value that is written down or passed between packages, and what its fields are made of."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST = 2**53
"""No count is larger: up to here every whole number is a float too, so no quotient or product of some overflows."""

PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
"""A count from 1 on."""
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
"""A count from 0 on."""


def check_path(path: Path) -> Path:
    """Refuse what no file system takes, here, where the field is known; it would fail in the middle of something.

    Raises ValueError.
    """
    if "\0" in str(path):
        raise ValueError("a path has no NUL character in it")
    try:
        os.fsencode(path)
        expanded = path.expanduser()
    except UnicodeEncodeError:
        raise ValueError("a path has no lone surrogate in it") from None
    except RuntimeError:
        if path.parts[0] == "~":
            raise ValueError(f"there is no home directory for {path}: set HOME, or name another path") from None
        raise ValueError(f"there is no user {path.parts[0]!r}") from None
    longest = max((len(os.fsencode(part)) for part in expanded.parts), default=0)
    if longest > 255 or len(os.fsencode(expanded)) > 4095:
        raise ValueError("a path has at most 4095 bytes, and 255 between two slashes")
    return path


UserPath = Annotated[Path, AfterValidator(check_path)]
"""A path that a person wrote, `~` not yet expanded."""


class Record(BaseModel):
    """An immutable, strictly validated value. Unknown fields are errors; attribute docstrings are field
    descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)

    # Configurations are keys of many dictionaries, and a decision looks thousands of them up: the hash is kept. It is
    # no field, so that copies and pickles, whose strings may hash differently, work out their own.
    __slots__ = ("_hash",)

    def __hash__(self) -> int:
        try:
            kept: int = object.__getattribute__(self, "_hash")
        except AttributeError:
            kept = hash((type(self), *self.__dict__.values()))
            object.__setattr__(self, "_hash", kept)
        return kept
