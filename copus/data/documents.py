"""Documents of a source as a stream of batches, a few MiB at a time, whatever the format of its files.

Files are read in one process, in order; `documents_of` makes documents out of a batch, in any process. pyarrow, which
parquet, Arrow and zstd need, is imported when such a file is read.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from copus.data.sources import is_unicode, kind_of, stem_of
from copus.job import JobError

BATCH_BYTES = 2 << 20
"""A batch is complete when it has so many bytes; a longer line or row is a batch by itself."""
_SMALLEST_PIECE = 1 << 18
_LONGEST_ROWS = 256
"""Rows of a table that are read together, before their bytes are known."""


class Columns(NamedTuple):
    """Which parts of a JSON line or of a row are read."""

    text: str = "text"
    """Name of the text."""
    messages: str | None = None
    """Name of the conversation, if it is read in place of a text."""

    @property
    def content(self) -> str:
        """Name of what is read."""
        return self.messages or self.text


@dataclass(frozen=True)
class Document:
    """A text that training sees from end to end, or a piece of a long one."""

    name: str
    """Where it comes from: a file, or file:line."""
    work: str
    """What it is a part or an edition of. All documents of a work stand on the same side."""
    text: str
    """The text, never empty; of a conversation, what all of its messages say."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The messages of a conversation."""
    begins: bool = True
    """Whether this is the beginning of the document."""
    ends: bool = True
    """Whether this is the end of the document."""

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the document."""
        return self.begins and self.ends

    @property
    def bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode())


class Batch(NamedTuple):
    """Consecutive records of one file, or a piece of a long text."""

    file: Path
    """The file."""
    kind: str
    """`text`, `json` or `rows`; `documents` if they are complete."""
    records: list[Any]
    """Bytes of a text or of JSON lines; of rows (content, work) each; documents."""
    first: int = 1
    """Number of the first record in its file."""
    begins: bool = True
    """Whether this piece is the beginning of its text."""
    ends: bool = True
    """Whether this piece is the end of its text."""
    position: int = 0
    """Bytes of the file that were read by then."""
    suffix: str = ""
    """Put after the name of the work: ` (beginning)` and ` (end)` of a document that is cut in two."""


def read_batches(files: Iterable[Path], columns: Columns, *, cut: bool = False) -> Iterator[Batch]:
    """Everything in the files, in order. Raises JobError with file and line if one cannot be read.

    With `cut` the one long text of the files is cut in two, so that there is something to hold out.
    """
    for file in files:
        kind = kind_of(file)
        if kind == "text" and columns.messages:
            raise JobError(
                f"data.source: {file} is text, and data.messages_column({columns.messages}) reads conversations: JSON "
                "lines or tables"
            )
        if kind == "text":
            yield from _text_batches(file, cut)
        elif kind == "json":
            yield from _line_batches(file)
        else:
            yield from _row_batches(file, columns)


def documents_of(batch: Batch, columns: Columns) -> Iterator[Document]:
    """The documents of a batch; blank ones are left out.

    A text file is one document, and its work is its name without suffix. So is each JSON line: an object with the
    column of the text and an optional `work`; without it the line is a work by itself, `file:line`. So is each row of a
    table. Raises JobError, naming file and line.
    """
    if batch.kind == "documents":
        yield from batch.records
        return
    document: Document | None
    for number, record in enumerate(batch.records, start=batch.first):
        if batch.kind == "text":
            document = _text(batch, record)
        else:
            document = _record(batch.file, number, record, batch.kind, columns)
        if document is not None and (document.text.strip() or not document.is_whole):
            yield document


def cut_in_two(document: Document) -> list[Document]:
    """A beginning and an end of 5 to 10 %, cut between paragraphs, else lines, else words; whole if there is no such
    place."""
    text = document.text
    for separator in ("\n\n", "\n", " "):
        place = text.rfind(separator, round(0.9 * len(text)), round(0.95 * len(text)))
        beginning, end = text[:place], text[place:]
        if place > 0 and beginning.strip() and end.strip() and not document.messages:
            parts = ("beginning", beginning), ("end", end)
            return [replace(document, work=f"{document.work} ({name})", text=part) for name, part in parts]
    return [document]


def _text(batch: Batch, content: bytes) -> Document:
    try:
        text = content.decode("utf-8-sig" if batch.begins else "utf-8")
    except UnicodeDecodeError as error:
        start = batch.position - len(content) + error.start
        raise JobError(f"data.source: {batch.file}: not UTF-8 text: {error.reason} at byte {start}") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    work = stem_of(batch.file) + batch.suffix
    return Document(batch.file.name, work, text, begins=batch.begins, ends=batch.ends)


def _record(file: Path, number: int, record: Any, kind: str, columns: Columns) -> Document | None:
    """The document of a JSON line or of a row."""
    where = f"data.source: {file}:{number}"
    if kind == "json":
        if not record.strip():
            return None
        try:
            value = json.loads(record.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise JobError(f"{where}: not UTF-8 text: {error.reason}") from None
        except (ValueError, RecursionError) as error:
            raise JobError(f"{where}: not JSON: {error}") from None
        expected = "a list" if columns.messages else "a string"
        if not isinstance(value, dict) or not isinstance(value.get(columns.content), list if columns.messages else str):
            raise JobError(f'{where}: expected an object with {expected} "{columns.content}" a line')
        content, work = value[columns.content], value.get("work")
    else:
        content, work = record
        if content is None:
            return None
    if work is not None and not isinstance(work, str):
        raise JobError(f'{where}: "work" is not a string, got {work!r}')
    messages = _messages(content, where, columns) if columns.messages else []
    text = "\n".join(message["content"] for message in messages) if columns.messages else content
    for key, said in ((columns.content, text), ("work", work or "")):
        if not is_unicode(said):
            raise JobError(f'{where}: "{key}" has a lone surrogate, half of a character')
    name = f"{stem_of(file)}:{number}"
    return Document(name, work or name, text, messages)


def _messages(content: Any, where: str, columns: Columns) -> list[dict[str, Any]]:
    """The messages of a conversation. Raises JobError if they are not."""
    for number, message in enumerate(content):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise JobError(f'{where}: "{columns.messages}" {number} is no object with the strings "role" and "content"')
    return [dict(message) for message in content]


def _text_batches(file: Path, cut: bool) -> Iterator[Batch]:
    """A text in one batch, or if it is long in pieces that end at line ends."""
    with _open(file) as stream:
        size = file.stat().st_size  # of a compressed file, which is no less than this
        wanted = min(max(size // 20, _SMALLEST_PIECE), BATCH_BYTES)
        end_begins = round(0.9 * size) if cut and size > BATCH_BYTES else None
        position, begins, suffix = 0, True, "" if end_begins is None else " (beginning)"
        piece = _next_piece(stream, wanted if size > BATCH_BYTES else BATCH_BYTES + 1)
        while piece:
            following = _next_piece(stream, wanted)
            position += len(piece)
            if end_begins is not None and suffix == " (beginning)" and position >= end_begins and following:
                yield Batch(file, "text", [piece], 1, begins, True, position, suffix)
                begins, suffix = True, " (end)"
            else:
                yield Batch(file, "text", [piece], 1, begins, not following, position, suffix)
                begins = False
            piece = following


def _next_piece(stream: BinaryIO, wanted: int) -> bytes:
    """About `wanted` bytes up to a line end between two characters that are no space, where no byte-level BPE merges
    across; more if there is none, and all that is left at the end."""
    piece = stream.read(wanted)
    while piece:
        line = stream.readline()
        piece += line
        if not line:
            return piece
        before, after = piece[-3:].rstrip(b"\r\n")[-1:], stream.peek(1)[:1]  # type: ignore[attr-defined]
        if piece.endswith(b"\n") and before > b" " and after > b" ":
            return piece
    return piece


def _line_batches(file: Path) -> Iterator[Batch]:
    with _open(file) as stream:
        yield from _in_batches(file, "json", ((line, len(line)) for line in stream))


def _row_batches(file: Path, columns: Columns) -> Iterator[Batch]:
    def size(content: Any) -> int:
        return len(content) if isinstance(content, str) else len(str(content))

    yield from _in_batches(file, "rows", (((content, work), size(content)) for content, work in _rows(file, columns)))


def _in_batches(file: Path, kind: str, records: Iterable[tuple[Any, int]]) -> Iterator[Batch]:
    """Records, given with their sizes, in batches of `BATCH_BYTES` or somewhat more."""
    batch: list[Any] = []
    first, size, position = 1, 0, 0
    for record, record_bytes in records:
        batch.append(record)
        size += record_bytes
        if size >= BATCH_BYTES:
            position += size
            yield Batch(file, kind, batch, first, position=position)
            first, batch, size = first + len(batch), [], 0
    if batch:
        yield Batch(file, kind, batch, first, position=position + size)


def _rows(file: Path, columns: Columns) -> Iterator[tuple[Any, Any]]:
    """Content and work of every row of a parquet file or an Arrow file."""
    pyarrow = need_pyarrow(file)
    try:
        if kind_of(file) == "parquet":
            import pyarrow.parquet as parquet

            with parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
                names = _readable(table.schema_arrow, file, columns)
                tables: Iterable[Any] = table.iter_batches(batch_size=_LONGEST_ROWS, columns=names)
                yield from _rows_of(tables, columns)
        else:
            with pyarrow.memory_map(str(file)) as content:
                try:
                    reader: Any = pyarrow.ipc.open_stream(content)
                    tables = reader
                except pyarrow.ArrowInvalid:
                    reader = pyarrow.ipc.open_file(content)
                    tables = (reader.get_batch(index) for index in range(reader.num_record_batches))
                _readable(reader.schema, file, columns)
                yield from _rows_of(tables, columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise JobError(f"data.source: {file}: {' '.join(str(error).split())[:200]}") from None


def _rows_of(tables: Iterable[Any], columns: Columns) -> Iterator[tuple[Any, Any]]:
    for table in tables:
        for start in range(0, table.num_rows, _LONGEST_ROWS):
            part = table.slice(start, _LONGEST_ROWS)
            contents = part.column(columns.content).to_pylist()
            works = part.column("work").to_pylist() if "work" in part.schema.names else [None] * len(contents)
            yield from zip(contents, works, strict=True)


def _readable(schema: Any, file: Path, columns: Columns) -> list[str]:
    """The columns to read. Raises JobError if that of the content is missing or of another type."""
    if columns.content not in schema.names:
        setting = "data.messages_column" if columns.messages else "data.text_column"
        raise JobError(
            f"data.source: {file}: there is no column {columns.content!r} ({setting}) in it; it has "
            f"{', '.join(schema.names[:10])}"
        )
    kind = str(schema.field(columns.content).type)
    if not columns.messages and kind not in ("string", "large_string", "string_view"):
        raise JobError(f"data.source: {file}: column {columns.content!r} is of type {kind[:60]}, not a string")
    return [name for name in dict.fromkeys((columns.content, "work")) if name in schema.names]


def need_pyarrow(file: Path) -> Any:
    """pyarrow. Raises JobError, with the command that installs it, if it is missing."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise JobError(f"data.source: {file} needs pyarrow: pip install 'copus[data]'") from None
    return pyarrow


@contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    """A text file, decompressed. Whatever is wrong with it while it is open is a JobError."""
    try:
        if file.suffix.lower() == ".zst":
            stream: Any = io.BufferedReader(need_pyarrow(file).input_stream(str(file), compression="zstd"))
        elif file.suffix.lower() == ".gz":
            stream = io.BufferedReader(gzip.open(file), 1 << 20)  # noqa: SIM115
        else:
            stream = open(file, "rb", 1 << 20)  # noqa: SIM115
        with stream:
            yield stream
    except EOFError:
        raise JobError(f"data.source: {file}: cut short: the compressed data has no end") from None
    except zlib.error as error:
        raise JobError(f"data.source: {file}: damaged: {error}") from None
    except OSError as error:
        raise JobError(f"data.source: {file}: {error.strerror or error}") from None
