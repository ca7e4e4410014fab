"""Synthetic text and jobs for the data tests."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from copus.data.documents import Columns, Document, cut_in_two, documents_of, read_batches
from copus.data.held_out import HeldOut, WorkSizes, choose_held_out
from copus.data.indexed import IndexedWriter
from copus.data.prepared import needs_verifying
from copus.job import JobConfig, parse_job
from copus.manifest import mark_checked

_SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def prose(seed: int, words: int = 400) -> str:
    """Made-up sentences; two seeds share no run of eight words."""
    generator = random.Random(seed)
    text = ["".join(generator.choices(_SYLLABLES, k=generator.randint(1, 4))) for _ in range(words)]
    return "\n".join(" ".join(text[start : start + 9]).capitalize() + "." for start in range(0, words, 9)) + "\n"


def read_documents(files: list[Path], columns: Columns = Columns()) -> list[Document]:  # noqa: B008
    """Every document of the files; one that is alone is cut in two."""
    documents = [d for batch in read_batches(files, columns) for d in documents_of(batch, columns)]
    return cut_in_two(documents[0]) if len(documents) == 1 else documents


def held_out_of(works: dict[str, int], names: list[str], share: float | None = None) -> set[str]:
    """The works that are held out."""
    sizes = WorkSizes(names)
    sizes.add(works, len(works))
    held_out: HeldOut = choose_held_out(sizes, names, share)
    return {work for work in works if work in held_out}


def write_works(folder: Path, **works: str) -> Path:
    """A folder with one text file a work."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in works.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def make_job(cache: Path, data: dict[str, Any], vocab: int = 300, seq_len: int = 32, **training: Any) -> JobConfig:
    """A job that differs from others in its data only, unless told."""
    return parse_job(
        {
            "name": "data",
            "model": {
                "layers": 1,
                "hidden": 32,
                "ffn_hidden": 64,
                "heads": 2,
                "kv_heads": 2,
                "seq_len": seq_len,
                "vocab": vocab,
            },
            "data": {"cache": str(cache), **data},
            "cluster": {"nodes": 1, "accelerators_per_node": 1},
            "training": {"global_batch": 4, "tokens": 10_000, **training},
        }
    )


def write_in_the_past(path: Path, content: bytes) -> None:
    """Write a file and return once the file system's clock (some milliseconds a tick) has moved on since."""
    path.write_bytes(content)
    probe = path.with_name("clock")
    try:
        while not probe.exists() or probe.stat().st_ctime_ns <= path.stat().st_ctime_ns:
            probe.touch()
    finally:
        probe.unlink(missing_ok=True)


def take_as_verified(folder: Path) -> None:
    """Have prepared data count as verified, once the clock has moved on from when its files were written."""
    while needs_verifying(folder):
        mark_checked(folder)


def write_indexed(prefix: Path, documents: Iterable[np.ndarray], vocab: int) -> None:
    """Write `<prefix>.bin` and `<prefix>.idx`."""
    writer = IndexedWriter(prefix, vocab)
    for document in documents:
        writer.write(document, np.array([len(document)]))
    writer.finish()
