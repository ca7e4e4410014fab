"""Which folders of a run are checkpoints, and whether one is whole. Without torch: the launcher looks at them too."""

import itertools
import json
import re
from pathlib import Path

from copus.fencing import end_if_replaced
from copus.job import JobError
from copus.manifest import damage, read_manifest, wrong_size

FOLDER = "checkpoints"
"""Where they are in a run directory."""
REPLACED = ".replaced"
"""At the end of the name of one that steps aside for another with as many samples, until that one has its place."""
_NAME = re.compile(rf"samples-(\d+)({re.escape(REPLACED)})?")


def checkpoint_names(run: Path) -> list[str]:
    """Names of the checkpoints, newest first; of two with as many samples the one that is not being replaced."""
    matches = [match for path in (run / FOLDER).glob("samples-*") if (match := _NAME.fullmatch(path.name))]
    matches.sort(key=lambda match: (int(match[1]), match[2] is None), reverse=True)
    return [match[0] for match in matches]


def samples_of(name: str) -> int:
    """Samples that had been trained on when the checkpoint of this name was written."""
    return int(name.removeprefix("samples-").removesuffix(REPLACED))


def set_aside(run: Path, name: str, why: str) -> str:
    """Rename a checkpoint so that nothing takes it for one any more: no resume, and no retention. Its new name."""
    numbers = itertools.count(2)
    aside = f"{name}.{why}"
    while (run / FOLDER / aside).exists():
        aside = f"{name}.{why}-{next(numbers)}"
    (run / FOLDER / name).rename(run / FOLDER / aside)
    return aside


def set_damaged_aside(run: Path, newest: str | None) -> None:
    """Rename the checkpoints that are newer than the newest one that verifies: none of them does. None: all of them.

    So they neither take the place of a good one among those that are kept, nor are removed.
    """
    names = checkpoint_names(run)
    end_if_replaced(run)
    for name in names[: len(names) if newest is None else names.index(newest)]:
        set_aside(run, name, "damaged")


def quick_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is surely not whole, by its manifest and the sizes of its files; None if that is all right."""
    try:
        return wrong_size(checkpoint, read_manifest(checkpoint))
    except ValueError as error:
        return str(error)


def whats_wrong(checkpoint: Path, share: slice = slice(None)) -> str | None:
    """Why a checkpoint cannot be trusted, by its checksums; None if it verifies.

    `share`: which of its files are read, of their names in order.
    """
    try:
        expected = read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    if "trainer.json" not in expected:
        return "the manifest lists no trainer.json"
    return damage(checkpoint, {name: expected[name] for name in sorted(expected)[share]})


def check_same_data(checkpoint: Path, data: str | None) -> None:
    """Raise JobError if a checkpoint was trained on other data than the one with this digest.

    Does nothing if the checkpoint cannot be read, and so is none, or if it is of an older version and does not say.
    """
    try:
        trained_on = json.loads((checkpoint / "trainer.json").read_bytes())["state"].get("data")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return
    if data and trained_on and trained_on != data:
        raise JobError(
            f"{checkpoint.name} was trained on the data {trained_on}, and this job has the data {data}: a run goes on "
            "with the text and the tokenizer that it began with"
        )
