"""A job file that was made from another tool's arguments: its fields, where each comes from, and what has no field."""

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from copus.job import JobConfig

Effect = Literal["changes the training", "is lost", "is not needed", "is unknown"]
"""What it means that an argument has no field: another model or another optimization; something that the run does
without; nothing, since it is about speed or is always so; or nobody here knows the argument."""
ORDER: tuple[Effect, ...] = ("changes the training", "is lost", "is unknown", "is not needed")
"""Effects, the gravest first."""
HEADINGS: dict[Effect, str] = {
    "changes the training": "No field stands for these, and the training is another one for it:",
    "is lost": "No field stands for these, and the run does without:",
    "is unknown": "These are not known here:",
    "is not needed": "These need no field:",
}


@dataclass(frozen=True)
class Unmapped:
    """An argument that has no field."""

    argument: str
    """As it was written, with its value."""
    effect: Effect
    """What that means."""
    reason: str
    """Why, or what is done in its place."""


@dataclass
class ImportedJob:
    """Fields of a job file with their origins."""

    values: dict[str, Any] = field(default_factory=dict)
    """Sections and fields, as in the file."""
    comments: dict[str, str] = field(default_factory=dict)
    """`section.field` → comment behind it."""
    unmapped: list[Unmapped] = field(default_factory=list)
    """Arguments without a field."""
    mapped: int = 0
    """Arguments with one."""
    assumed: list[str] = field(default_factory=list)
    """Fields that no argument says, as sentences."""
    notes: list[str] = field(default_factory=list)
    """What else could not be followed."""

    def put(self, place: str, value: Any, comment: str = "") -> None:
        """Set `section.field`, with a comment behind it."""
        *sections, name = place.split(".")
        inner = self.values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
        if comment:
            self.comments[place] = comment

    def assume(self, place: str, value: Any, why: str) -> None:
        """Set a field that no argument says."""
        self.put(place, value, f"assumed: {why}")
        self.assumed.append(f"{place}: {value} ({why})")

    def leave(self, argument: str, effect: Effect, reason: str) -> None:
        """Report an argument that has no field."""
        self.unmapped.append(Unmapped(argument, effect, reason))

    def text(self, heading: list[str]) -> str:
        """The job file: a heading as comments, the fields, and the arguments without a field as comments."""
        lines = [f"# {line}" for line in heading]
        for section in _in_order(self.values, JobConfig):
            lines += self._lines(section, self.values[section])
        for effect in ORDER:
            if reasons := self._reasons(effect):
                lines += ["", f"# {HEADINGS[effect]}"]
                lines += [line for entry in reasons for line in _wrapped(entry, "#   ", "#     ")]
        return "\n".join(lines) + "\n"

    def _lines(self, section: str, value: Any) -> list[str]:
        """A section of the file: one line a field."""
        if not isinstance(value, dict) or not value:
            return [f"{section}: {_spelled(value)}{self._comment(section)}"]
        model = JobConfig.model_fields[section].annotation if section in JobConfig.model_fields else None
        fields = _in_order(value, model)
        return [f"{section}:", *(f"  {n}: {_spelled(value[n])}{self._comment(f'{section}.{n}')}" for n in fields)]

    def _comment(self, place: str) -> str:
        return f"  # {self.comments[place]}" if place in self.comments else ""

    def _reasons(self, effect: Effect) -> list[str]:
        """The arguments with this effect; those that have a reason in common, in one entry."""
        by_reason: dict[str, list[str]] = {}
        for argument in self.unmapped:
            if argument.effect == effect:
                by_reason.setdefault(argument.reason, []).append(argument.argument)
        return [f"{', '.join(arguments)}: {reason}" for reason, arguments in by_reason.items()]

    def summary(self) -> list[str]:
        """For standard error: how many arguments became fields, and what to look at."""
        effects = Counter(argument.effect for argument in self.unmapped)
        counts = [f"{effects[effect]} {_counted(effect, effects[effect])}" for effect in ORDER if effects[effect]]
        lines = [f"{self.mapped} arguments mapped, {len(self.unmapped)} commented" + _in_brackets(counts)]
        for effect in ("changes the training", "is unknown"):
            for entry in self._reasons(effect):
                lines += _wrapped(f"{effect.removeprefix('is ')}: {entry}", "  ", "    ")
        return [*lines, *(f"  assumed: {text}" for text in self.assumed), *(f"  {note}" for note in self.notes)]


def _in_order(values: dict[str, Any], model: Any) -> list[str]:
    """Names of fields, those of the model first and in its order."""
    fields = list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
    return [name for name in fields if name in values] + [name for name in values if name not in fields]


def _wrapped(text: str, first: str, further: str) -> list[str]:
    """Lines of at most 120 letters."""
    return textwrap.wrap(text, 120, initial_indent=first, subsequent_indent=further, break_on_hyphens=False)


def _counted(effect: Effect, number: int) -> str:
    plural = {"changes the training": "change the training", "is lost": "are lost", "is unknown": "are unknown"}
    return effect if number == 1 else plural.get(effect, "are not needed")


def _in_brackets(counts: list[str]) -> str:
    return f" ({', '.join(counts)})" if counts else ""


def _spelled(value: Any) -> str:
    """A value in YAML on one line; large whole numbers in groups of three digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1_000_000:
        return f"{value:_}"
    if isinstance(value, float):  # YAML 1.1 reads 1e-05 as text: it wants a dot
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
