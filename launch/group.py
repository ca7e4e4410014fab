"""Runs that belong together: every combination of the settings of a matrix, each with several seeds."""

import hashlib
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from copus.durable import write_atomically
from copus.job import JobConfig, JobError
from copus.job_text import parse_job_text
from launch.run_names import runs_folder, runs_in
from profiles.record import Record

FILE = "group.json"
"""In the run directory of each member."""
SEED = "training.seed"
MOST_RUNS = 1000
MOST_CHARACTERS = 64
"""Of the name of a job."""
SHARED = ("name", "launch")
"""Fields and sections that all runs of a group have in common: they are queued together."""


class Member(Record):
    """What tells a run from the others of its group."""

    group: str
    """Name of the job."""
    settings: dict[str, str]
    """Field of the matrix → its value, as it was typed."""
    seed: int | None = None
    """None if the group has one run of each combination."""


@dataclass(frozen=True)
class Planned:
    """A run of a group before it is made."""

    name: str
    member: Member

    @property
    def overrides(self) -> list[str]:
        """For `load_job`."""
        seed = [] if self.member.seed is None else [f"{SEED}={self.member.seed}"]
        return [*(f"{field}={value}" for field, value in self.member.settings.items()), *seed, f"name={self.name}"]


def parse_matrix(options: Sequence[str], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Field → values, from `section.field=value,value` with the values in YAML. Raises JobError for anything else, and
    for fields that are set elsewhere too."""
    matrix: dict[str, list[str]] = {}
    for option in options:
        field, _, text = option.partition("=")
        if not field or not text:
            raise JobError(f"--matrix {option}: expected section.field=value,value")
        if field.split(".")[0] in SHARED:
            raise JobError(f"--matrix {option}: all runs of a group have the same {field}")
        if "." not in field:
            raise JobError(f"--matrix {option}: expected section.field=value,value")
        if other := next((other for other in matrix if _overlap(field, other)), None):
            raise JobError(f"--matrix {option}: {other} is in the matrix already")
        names = [override.partition("=")[0] for override in overrides]
        if other := next((name for name in names if name.startswith(f"{field}.") or name == field), None):
            raise JobError(f"--matrix {option}: --set names {other} too")
        matrix[field] = values = _split(option, text)
        repeated = next((value for value in values if values.count(value) > 1), None)
        if repeated is not None:
            raise JobError(f"--matrix {option}: {repeated} stands twice")
    return matrix


def _overlap(field: str, other: str) -> bool:
    """Whether one is the other, or a part of it."""
    return f"{field}.".startswith(f"{other}.") or f"{other}.".startswith(f"{field}.")


def _split(option: str, text: str) -> list[str]:
    """The values as they were typed: commas within brackets and quotes do not separate."""
    sequence = f"[{text}]"
    try:
        parse_job_text(sequence)
        node = yaml.compose(sequence)
    except ValueError as error:
        raise JobError(f"--matrix {option}: {error}") from None
    assert isinstance(node, yaml.SequenceNode)
    return [sequence[value.start_mark.index : value.end_mark.index].strip() for value in node.value]


def plan_group(job: JobConfig, matrix: dict[str, list[str]], seeds: int | None) -> list[Planned]:
    """Every run of the group: combinations in the order of the matrix, the seeds of one after another, from that of the
    job on. Raises JobError for more than `MOST_RUNS`, and for names that are not different."""
    if seeds is not None and seeds < 1:
        raise JobError(f"--seeds {seeds}: at least 1")
    if seeds is not None and SEED in matrix:
        raise JobError(f"--seeds {seeds}: {SEED} is in the matrix already")
    number = math.prod(map(len, matrix.values()), start=seeds or 1)
    if number > MOST_RUNS:
        factors = " × ".join(str(len(values)) for values in matrix.values())
        raise JobError(f"--matrix, --seeds: {factors} × {seeds or 1} = {number} runs, at most {MOST_RUNS}")
    seed_values = [None] if seeds is None else [job.training.seed + index for index in range(seeds)]
    labels = _labels(list(matrix))
    planned: dict[str, Planned] = {}
    for values, seed in itertools.product(itertools.product(*matrix.values()), seed_values):
        member = Member(group=job.name, settings=dict(zip(matrix, values, strict=True)), seed=seed)
        parts = [f"{label}-{_plain(value)}" for label, value in zip(labels, values, strict=True)]
        name = _shortened("-".join([job.name, *parts, *([] if seed is None else [f"seed-{seed}"])]))
        if name in planned:
            raise JobError(
                f"--matrix: {planned[name].member.settings} and {member.settings} would both be named {name}"
            )
        planned[name] = Planned(name, member)
    return list(planned.values())


def _labels(fields: Sequence[str]) -> list[str]:
    """As little of the end of each field as tells it from the others."""
    labels = []
    for field in fields:
        parts = field.split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other for other in fields if other != field]
        labels.append(next((end for end in endings if not any(f".{o}".endswith(f".{end}") for o in others)), field))
    return labels


def _plain(value: str) -> str:
    """A value as part of a name: `{tp: 2, dp: 1}` is `tp_2_dp_1`."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", value).strip("_")


def _shortened(name: str) -> str:
    if len(name) <= MOST_CHARACTERS:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MOST_CHARACTERS - 9]}-{digest}"


def write_member(run: Path, member: Member) -> None:
    """Say what a run is in its group."""
    write_atomically(run / FILE, member.model_dump_json(indent=2) + "\n")


def read_member(run: Path) -> Member | None:
    """What a run is in its group; None if it is in none, or nobody can read which."""
    try:
        return Member.model_validate_json((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def find_group(text: str, folder: Path | None = None) -> tuple[Path, str]:
    """The folder and the name of a group from what a person typed: a name in `runs_folder`, or FOLDER/NAME, as of a
    run. Raises JobError if a `folder` was named too."""
    place, name = os.path.split(text)
    if place and folder is not None:
        raise JobError(f"--group {text}: the folder {folder} is named too: say one of them")
    return Path(place).expanduser() if place else folder or runs_folder(), name


def runs_of_group(folder: Path, group: str) -> list[Path]:
    """The runs of a group in a folder, by name. Raises JobError if there are none."""
    members = {run: read_member(run) for run in sorted(runs_in(folder))}
    runs = [run.absolute() for run, member in members.items() if member is not None and member.group == group]
    if not runs:
        groups = sorted({member.group for member in members.values() if member is not None})
        raise JobError(f"--group {group}: no run in {folder} is of it; groups there: {', '.join(groups) or 'none'}")
    return runs
