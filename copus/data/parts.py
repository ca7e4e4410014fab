"""The parts of a job's data: text that is to be prepared, and datasets that Megatron's tools have prepared."""

from pathlib import Path
from typing import NamedTuple

from copus.data.index_header import is_prefix, read_header
from copus.data.sources import source_files
from copus.job import DataConfig, JobError


class PartSource(NamedTuple):
    """What a part of a blend is made from."""

    name: str
    """Path as the job file has it, or `shakespeare`; several paths are joined with commas."""
    files: tuple[Path, ...]
    """Files of text; none of a prefix and of `shakespeare`."""
    prefix: Path | None = None
    """Prefix of an indexed dataset."""
    weight: float | None = None
    """Weight in the blend; None for the number of training tokens."""

    @property
    def has_text(self) -> bool:
        """Whether there is text to prepare."""
        return self.prefix is None


def training_parts(data: DataConfig) -> list[PartSource]:
    """The parts of `data.source`: with `data.weights` one for each entry, otherwise all text is one part. Raises
    JobError for what does not exist."""
    if data.source == "shakespeare":
        return [PartSource("shakespeare", (), weight=data.weights[0] if data.weights else None)]
    assert isinstance(data.source, list)
    if data.weights is None:
        return _parts(data.source)
    parts = []
    for path, weight in zip(data.source, data.weights, strict=True):
        parts += [part._replace(weight=weight) for part in _parts([path])]
    return parts


def held_out_parts(data: DataConfig) -> list[PartSource]:
    """The parts of `data.held_out_source`. Raises JobError for what does not exist."""
    return _parts(data.held_out_source) if data.held_out_source else []


def _parts(paths: list[Path]) -> list[PartSource]:
    """All text as one part, and a part for each prefix, in the order of the paths."""
    parts: list[PartSource] = []
    text = [path for path in paths if _prefix(path) is None]
    if text or not paths:
        parts.append(PartSource(", ".join(map(str, text)), tuple(source_files(text))))
    for path in paths:
        prefix = _prefix(path)
        if prefix is not None:
            read_header(prefix)
            parts.append(PartSource(str(path), (), prefix))
    return parts


def _prefix(path: Path) -> Path | None:
    """The prefix of an indexed dataset that a path names, also by one of its files; None if it names something else.
    Raises JobError if one of the two files is missing."""
    path = path.expanduser()
    if path.suffix in (".bin", ".idx"):
        prefix, other = path.with_suffix(""), path.with_suffix(".idx" if path.suffix == ".bin" else ".bin")
        if path.is_file() and not other.is_file():
            raise JobError(f"data.source: {path} is half of an indexed dataset: {other.name} is missing")
        return prefix if is_prefix(prefix) else None
    return path if not path.exists() and is_prefix(path) else None
