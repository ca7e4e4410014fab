"""What is wrong with values that a person wrote, in one line: the field, what is expected, and what is there."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def first_message(error: ValidationError, *within: str, model: type[BaseModel] | None = None) -> str:
    """`field: what is wrong (got value)` for the first thing wrong; `within` are the sections that were not validated
    with it. For an unknown key the nearest fields of `model`, which was validated, are offered."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if first["type"] == "missing":  # a misspelt field is missing too: the key that was written says more
        beside = (other for other in errors if other["loc"][:-1] == first["loc"][:-1])
        first = next((other for other in beside if other["type"] == "extra_forbidden"), first)
    # After `optimizer` pydantic names the kind, which is no part of the path in the file.
    before = (None, *first["loc"])
    location = [part for part, holder in zip(first["loc"], before, strict=False) if holder != "optimizer"]
    place = ".".join(str(part) for part in (*within, *location))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _fields_at(model, first["loc"][:-1]), n=2, cutoff=0.7)
        message = f"unknown key; did you mean {' or '.join(near)}?" if near else "unknown key"
    elif first["type"] not in ("value_error", "missing"):
        message = f"{message[0].lower()}{message[1:]}, got {shortened(first['input'])}"
    return f"{shortened(place, 200, str)}: {message}" if place else message


def located(where: str, check: Any) -> Any:
    """What a check returns. The place in the job file is put before what it says against a value."""
    try:
        return check()
    except ValidationError as error:
        raise ValueError(f"{where}: {first_message(error)}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def shortened(value: Any, longest: int = 80, spell: Callable[[Any], str] = repr) -> str:
    """A value of the user's for a message: on one line, without control codes, not too long."""
    text = "".join(letter if letter.isprintable() else "�" for letter in spell(value))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _fields_at(model: type[BaseModel] | None, location: Sequence[Any]) -> list[str]:
    """The fields of the section at a place in a model. A section that comes in several kinds is followed by its kind,
    as pydantic has it."""
    sections = [] if model is None else [model]
    for part in location:
        inside = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
        if inside:
            sections = [section for annotation in inside for section in _sections_in(annotation)]
        else:
            sections = [section for section in sections if part in _kinds(section)]
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]
