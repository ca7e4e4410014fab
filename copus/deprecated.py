"""Job file fields of earlier versions, read as the fields that replaced them.

Apart from the job's models, so that these know nothing of the past; a table here is all that a rename takes.
"""

from typing import Any

RENAMED = {
    f"training.{name}": f"training.optimizer.{name}"
    for name in ("betas", "epsilon", "weight_decay", "lr_batch_exponent", "beta2_follows_batch")
}
"""Dotted name in 0.1.0 → dotted name now."""


def rename_deprecated(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Plain values of a job file with today's names, and the deprecated names among those given.

    Raises ValueError if a field is given by both names.
    """
    used: list[str] = []
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        holder = _section(values, sections)
        if name not in holder:
            continue
        *new_sections, new_name = new.split(".")
        if new_sections[-1] in holder and not isinstance(holder[new_sections[-1]], dict):
            continue  # no section, which validation will say
        if new_name in _section(values, new_sections):
            raise ValueError(f"{old} is called {new} now, and both are given: remove {old}")
        values = _with(values, sections, {key: value for key, value in holder.items() if key != name})
        values = _with(values, new_sections, {**_section(values, new_sections), new_name: holder[name]})
        used.append(old)
    return values, used


def deprecation_line(used: list[str]) -> str:
    """One line for people."""
    return f"deprecated: {', '.join(f'{old} is now {RENAMED[old]}' for old in used)}"


def _section(values: Any, sections: list[str]) -> dict[str, Any]:
    """A section by its path; empty if there is none."""
    for section in sections:
        values = values.get(section) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _with(values: dict[str, Any], sections: list[str], content: dict[str, Any]) -> dict[str, Any]:
    """A copy in which a section has another content."""
    if not sections:
        return content
    first, *rest = sections
    return {**values, first: _with(_section(values, [first]), rest, content)}
