"""Text into indexed datasets: several passes over the source, each a stream, so that memory does not grow with it.

1. Sizes of works, which decide what is held out.
2. The held-out text, which training documents are compared with.
3. The tokenizer, unless the job has one: trained on at most 64 MiB of the training side, spread over all of it.
4. Tokens. Every few seconds the place is noted, and a preparation that was killed goes on from there.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from copus.data import shakespeare
from copus.data.chat import template_text
from copus.data.documents import BATCH_BYTES, Batch, Columns, Document, read_batches
from copus.data.encoding import (
    EncodedBatch,
    Encoding,
    PartBatch,
    encode_batch,
    held_out_documents,
    sizes_of,
    training_texts,
)
from copus.data.held_out import HeldOut, WorkSizes, choose_held_out
from copus.data.indexed import IndexedWriter
from copus.data.manifest import MOST_LISTED, Dropped, Side, Slice, Work
from copus.data.overlap import HeldOutText
from copus.data.parts import PartSource
from copus.data.text_check import held_out_names
from copus.data.tokenizer import (
    END_OF_DOCUMENT,
    check_spelling,
    check_tokenizer,
    load_tokenizer,
    token_id,
    train_tokenizer,
)
from copus.data.worker_processes import default_processes, ordered_map
from copus.durable import replace_text
from copus.job import DataConfig, JobConfig, JobError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is to do."""

TOKENIZER_BYTES = 64 << 20
"""Text that a tokenizer is trained on; of more, every nth batch."""
IN_PROCESS_BYTES = 32 << 20
"""Less text than this is prepared in one process: others would take longer to start."""
_SECONDS_BETWEEN_NOTES = 5.0
_NOTE = "progress.json"


class TextPipeline:
    """The text of a job on its way into one folder."""

    def __init__(self, job: JobConfig, parts: list[PartSource], folder: Path, progress: Progress) -> None:
        """`parts` are those with text, those of `data.held_out_source` last, whose works are all held out."""
        data = job.data
        self._job, self._parts, self._folder, self._progress = job, parts, folder, progress
        self._bytes = sum(map(_bytes, parts))
        several = self._bytes >= IN_PROCESS_BYTES
        self._processes = (data.processes or default_processes()) if several else 1
        self._columns = Columns(data.text_column, data.messages_column)
        self._note = _read_note(folder / _NOTE)
        """What a preparation that was killed had come to."""

    def run(self, held_out_by_source: list[bool]) -> "Prepared":
        """Make the datasets. `held_out_by_source`: of each part, whether all of it is held out. Raises JobError."""
        encoding = Encoding(self._columns, self._job.model.vocab)
        encoding = self._choose_held_out(encoding, held_out_by_source)
        encoding = replace(encoding, held_out_text=self._held_out_text(encoding))
        encoding = self._with_tokenizer(encoding)
        return self._encode(encoding)

    def _choose_held_out(self, encoding: Encoding, by_source: list[bool]) -> Encoding:
        """The encoding that knows what is held out, and whether the source is one document."""
        data = self._job.data
        if self._note:
            held_out = tuple(HeldOut.model_validate(values) for values in self._note["held_out"])
            return replace(encoding, held_out=held_out, cuts=self._note["cuts"], shared_text=self._shared_text())
        held_out, cuts = self._by_sizes(encoding, by_source, data)
        return replace(encoding, held_out=held_out, cuts=cuts, shared_text=self._shared_text())

    def _by_sizes(
        self, encoding: Encoding, by_source: list[bool], data: DataConfig
    ) -> tuple[tuple[HeldOut, ...], bool]:
        for number, part in enumerate(self._parts):
            if not any(encoding.documents(item) for item in self._batches(False, {number})):
                files = ", ".join(map(str, part.files[:3])) + (" …" if len(part.files) > 3 else "")
                raise JobError(f"data.source: no text in {files}")
        if any(by_source):
            return tuple(HeldOut(everything=held_out) for held_out in by_source), False
        names = held_out_names(data)
        sizes = self._sizes(encoding, names)
        cuts = False
        if len(sizes) == 1 and sizes[0].documents == 1:
            cuts = True
            sizes = self._sizes(replace(encoding, cuts=True), names)
        if names:
            chosen = choose_held_out(_joined(sizes, names), names)
            return (chosen,) * len(self._parts), cuts
        return tuple(choose_held_out(size, names, data.held_out_share) for size in sizes), cuts

    def _sizes(self, encoding: Encoding, names: list[str]) -> list[WorkSizes]:
        sizes = [WorkSizes(names) for _ in self._parts]
        for item, result in self._map(sizes_of, encoding, "reading"):
            sizes[item.part].add(result.work_bytes, result.documents)
        return sizes

    def _held_out_text(self, encoding: Encoding) -> HeldOutText:
        of = {number for number, held_out in enumerate(encoding.held_out) if held_out.holds_any}

        def documents() -> Iterator[Document]:
            for _, result in self._map(held_out_documents, encoding, "reading held-out text", of=of):
                yield from result

        return HeldOutText(documents())

    def _shared_text(self) -> tuple[tuple[str, str], ...]:
        return shakespeare.SHARED_TEXT if self._job.data.source == "shakespeare" else ()

    def _with_tokenizer(self, encoding: Encoding) -> Encoding:
        """The encoding that has the tokenizer, which is written too."""
        data, path = self._job.data, self._folder / "tokenizer.json"
        source = data.tokenizer or path
        tokenizer = self._tokenizer(encoding) if not (self._note and path.is_file()) else load_tokenizer(path)
        eod = check_tokenizer(tokenizer, source, self._job.model.vocab, data.eos_token)
        bos = None if data.bos_token is None else token_id(tokenizer, source, data.bos_token, "data.bos_token")
        text = tokenizer.to_str(pretty=False)
        replace_text(path, text)
        encoding = replace(encoding, tokenizer_json=text, eod=eod, bos=bos)
        if data.messages_column is not None:
            names = {"bos_token": data.bos_token or "", "eos_token": str(tokenizer.id_to_token(eod))}
            return replace(encoding, template=template_text(data), **names)  # type: ignore[arg-type]
        if data.tokenizer and not self._note:
            check_spelling(tokenizer, data.tokenizer, self._training_texts(encoding, 1), data.eos_token)
        return encoding

    def _tokenizer(self, encoding: Encoding) -> "Tokenizer":
        data = self._job.data
        ends = (data.eos_token or END_OF_DOCUMENT[0],)
        special = ends if data.bos_token is None else (*ends, data.bos_token)
        if data.tokenizer:
            return load_tokenizer(data.tokenizer, (*END_OF_DOCUMENT, *special))
        every = max(1, -(-self._bytes // TOKENIZER_BYTES))
        return train_tokenizer(self._training_texts(encoding, every), self._job.model.vocab, special)

    def _training_texts(self, encoding: Encoding, every: int) -> Iterator[str]:
        """Texts of every nth batch. Raises JobError if there is none."""
        batches = self._map(training_texts, encoding, "reading training text", every)
        texts = (text for _, texts in batches for text in texts)
        first = next(texts, None)
        if first is None:
            raise self._nothing_left(encoding)
        return itertools.chain([first], texts)

    def _nothing_left(self, encoding: Encoding) -> JobError:
        """The error for a source of which all that is not held out repeats held-out text."""
        dropped = [
            f"{document.name}: {reason}"
            for item in self._batches(encoding.cuts)
            for document in encoding.documents(item)
            if encoding.side(item.part, document) == "train"
            and (reason := encoding.reason_to_drop(item.part, document))
        ]
        if not dropped:
            return JobError("data: nothing is left to train on: all of data.source is held out")
        return JobError(f"data: all {len(dropped)} training documents repeat held-out text; {dropped[0]}")

    def _encode(self, encoding: Encoding) -> "Prepared":
        prepared = Prepared(self._folder, self._parts, self._job.model.vocab, encoding, self._note)
        noted = time.monotonic()
        for item, result in self._map(encode_batch, encoding, "encoding", skip=prepared.batches):
            prepared.add(item.part, result)
            if time.monotonic() - noted > _SECONDS_BETWEEN_NOTES:
                replace_text(self._folder / _NOTE, json.dumps(prepared.note(encoding)))
                noted = time.monotonic()
        prepared.finish()
        (self._folder / _NOTE).unlink(missing_ok=True)
        if not prepared.tokens("train") and not all(held_out.everything for held_out in encoding.held_out):
            raise self._nothing_left(encoding)
        return prepared

    def _map(
        self,
        function: Callable[[Encoding, PartBatch], Any],
        encoding: Encoding,
        stage: str,
        every: int = 1,
        skip: int = 0,
        of: Set[int] | None = None,
    ) -> Iterator[tuple[PartBatch, Any]]:
        """Every nth batch, after the first `skip`, and what a function makes of it; `of` some parts or all."""
        total = -(
            -sum(_bytes(part) for number, part in enumerate(self._parts) if of is None or number in of) // (1 << 20)
        )
        before = 0  # bytes of the files that are complete

        def batches() -> Iterator[PartBatch]:
            for number, item in enumerate(self._batches(encoding.cuts, of)):
                if number >= skip and number % every == 0:
                    yield item

        self._progress(f"{stage}, MiB", 0, total)
        last: Path | None = None
        for item, result in ordered_map(function, encoding, batches(), self._processes):
            if last is not None and item.batch.file != last:
                before += last.stat().st_size if last.exists() else 0
            last = item.batch.file
            size = last.stat().st_size if last.exists() else 0
            self._progress(f"{stage}, MiB", min((before + min(item.batch.position, size)) >> 20, total), total)
            yield item, result
        self._progress(f"{stage}, MiB", total, total)

    def _batches(self, cut: bool, of: Set[int] | None = None) -> Iterator[PartBatch]:
        for number, part in enumerate(self._parts):
            if of is None or number in of:
                for batch in part_batches(part, self._job.data, self._columns, cut=cut):
                    yield PartBatch(number, batch)


class Prepared:
    """The datasets of the parts on each side, and what there is to say of them."""

    def __init__(
        self, folder: Path, parts: list[PartSource], vocab: int, encoding: Encoding, note: dict[str, Any] | None
    ) -> None:
        note = note or {"batches": 0, "largest": 0, "works": {}, "work_count": 0, "dropped": [], "dropped_count": 0}
        self.eod = encoding.eod
        self.batches: int = note["batches"]
        """Batches so far."""
        self.largest: int = note["largest"]
        """Largest id."""
        self.work_count: int = note["work_count"]
        """Works, each counted once if all are listed."""
        self.dropped_count: int = note["dropped_count"]
        """Documents that were kept out of training."""
        self._dropped: list[dict[str, str]] = note["dropped"]
        self._works: dict[str, list[Any]] = note["works"]
        self._masks = bool(encoding.template)
        self._folder, self._parts = folder, parts
        states = note.get("writers", {})
        self._sides = _sides(encoding.held_out)
        self._writers = {
            key: IndexedWriter(folder / self.prefix(*key), vocab, states.get(self.prefix(*key))) for key in self._sides
        }
        self._mask_files = {}
        for (part, side), writer in self._writers.items() if self._masks else ():
            file = open(folder / f"{self.prefix(part, side)}.mask", "ab")  # noqa: SIM115
            file.truncate(writer.tokens)
            self._mask_files[part, side] = file

    def prefix(self, part: int, side: Side) -> str:
        """The files of a part on one side, without suffix."""
        return side if sum(of == side for _, of in self._sides) == 1 else f"{side}-{part}"

    def add(self, part: int, result: EncodedBatch) -> None:
        """Append what a batch has become."""
        for side, encoded in result.sides.items():
            writer = self._writers[part, side]
            ids = np.concatenate(encoded.ids)
            writer.write(ids, np.array([len(document) for document in encoded.ids]), ends=encoded.ends)
            if self._masks:
                self._mask_files[part, side].write(np.concatenate(encoded.said).tobytes())
        if result.ends_dropped and self._writers[part, "train"].is_inside_document:
            self._writers[part, "train"].write(np.array([self.eod]), np.array([1]))
        for work, figures in result.works.items():
            self._count(work, figures)
        self._dropped += [dropped.model_dump() for dropped in result.dropped[: MOST_LISTED - len(self._dropped)]]
        self.dropped_count += len(result.dropped)
        self.largest = max(self.largest, result.largest)
        self.batches += 1

    def _count(self, work: str, figures: tuple[Side, int, int, int]) -> None:
        if work in self._works:
            side, *before = self._works[work]
            self._works[work] = [side, *(a + b for a, b in zip(before, figures[1:], strict=True))]
            return
        self.work_count += 1
        if len(self._works) < MOST_LISTED:
            self._works[work] = list(figures)

    def note(self, encoding: Encoding) -> dict[str, Any]:
        """What a preparation that begins anew goes on from; all of it is on disk when this returns."""
        for file in self._mask_files.values():
            file.flush()
            os.fsync(file.fileno())
        return {
            "held_out": [held_out.model_dump(mode="json") for held_out in encoding.held_out],
            "cuts": encoding.cuts,
            "batches": self.batches,
            "largest": self.largest,
            "works": self._works,
            "work_count": self.work_count,
            "dropped": self._dropped,
            "dropped_count": self.dropped_count,
            "writers": {self.prefix(*key): writer.state() for key, writer in self._writers.items()},
        }

    def finish(self) -> None:
        """Complete the files."""
        for file in self._mask_files.values():
            file.close()
        for writer in self._writers.values():
            writer.finish()

    def slice(self, part: int, side: Side) -> Slice | None:
        """The dataset of a part on one side; None if it is empty."""
        writer = self._writers.get((part, side))
        if writer is None or not writer.documents:
            return None
        return Slice(
            prefix=self.prefix(part, side),
            first=0,
            documents=writer.documents,
            tokens=writer.tokens,
            mask=self._masks,
        )

    def remove_empty(self) -> None:
        """Remove the files of datasets without a document."""
        for (part, side), writer in self._writers.items():
            if not writer.documents:
                for suffix in (".bin", ".idx", ".mask"):
                    (self._folder / f"{self.prefix(part, side)}{suffix}").unlink(missing_ok=True)

    def tokens(self, side: Side) -> int:
        """Tokens of one side."""
        return sum(writer.tokens for (_, of), writer in self._writers.items() if of == side)

    @property
    def works(self) -> list[Work]:
        """The works that are listed."""
        return [
            Work(name=name, side=side, documents=documents, tokens=tokens, bytes=size)
            for name, (side, documents, tokens, size) in self._works.items()
        ]

    @property
    def dropped(self) -> list[Dropped]:
        """The dropped documents that are listed."""
        return [Dropped.model_validate(values) for values in self._dropped]


def _sides(held_out: tuple[HeldOut, ...]) -> list[tuple[int, Side]]:
    """The sides that each part has: both, or one if there are sources that are held out whole."""
    if not any(part.everything for part in held_out):
        return [(number, side) for number in range(len(held_out)) for side in get_args(Side)]
    return [(number, "valid" if part.everything else "train") for number, part in enumerate(held_out)]


def _bytes(part: PartSource) -> int:
    return sum(file.stat().st_size for file in part.files)


def part_batches(part: PartSource, data: DataConfig, columns: Columns, *, cut: bool = False) -> Iterator[Batch]:
    """The text of a part as a stream."""
    if part.files:
        yield from read_batches(part.files, columns, cut=cut)
        return
    archive = shakespeare.fetch(data.cache.expanduser())
    yield from _grouped(shakespeare.read_documents(archive), archive)


def _grouped(documents: Iterable[Document], file: Path) -> Iterator[Batch]:
    group: list[Document] = []
    size = position = 0
    for document in documents:
        group.append(document)
        size += document.bytes
        if size >= BATCH_BYTES:
            position += size
            yield Batch(file, "documents", group, position=position)
            group, size = [], 0
    if group:
        yield Batch(file, "documents", group, position=position + size)


def _joined(sizes: list[WorkSizes], names: list[str]) -> WorkSizes:
    """Sizes over all parts."""
    joined = WorkSizes(names)
    for size in sizes:
        joined.add(size.tracked, size.documents)
        joined.named |= size.named
        joined.matched |= size.matched
        joined.forgot = joined.forgot or size.forgot
    return joined


def _read_note(path: Path) -> dict[str, Any] | None:
    """What a preparation that was killed had come to; None if there was none."""
    try:
        note: dict[str, Any] = json.loads(path.read_bytes())
        return note
    except (OSError, ValueError):
        return None
