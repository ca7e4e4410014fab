"""What is wrong with the text of a job, found before anything is made. Little text is read whole, of much the
beginning: the rest is checked as it is prepared."""

from collections import Counter

from copus.data import shakespeare
from copus.data.documents import Columns, Document, cut_in_two, documents_of, read_batches
from copus.data.held_out import WorkSizes, choose_held_out
from copus.data.parts import PartSource
from copus.data.tokenizer import check_spelling, load_tokenizer
from copus.job import DataConfig, JobConfig, JobError

CHECKED_BYTES = 32 << 20
"""Text up to this size is read whole."""


def held_out_names(data: DataConfig) -> list[str]:
    """Names and patterns of the works to hold out; none for those that a hash chooses."""
    if data.source == "shakespeare" and not (data.held_out or data.held_out_share or data.held_out_source):
        return list(shakespeare.DEFAULT_HELD_OUT)
    return data.held_out


def check_text(job: JobConfig, parts: list[PartSource]) -> None:
    """Raise JobError for text that cannot be read, for works to hold out that there are not, and for a tokenizer that
    cannot spell the text."""
    data = job.data
    columns = Columns(data.text_column, data.messages_column)
    if data.messages_column:
        from copus.data.chat import template_text  # which loads numpy

        template_text(data)
    names = held_out_names(data)
    works = WorkSizes(names)
    documents: list[Document] = []
    whole = sum(file.stat().st_size for part in parts for file in part.files) <= CHECKED_BYTES
    for part in parts:
        read = _documents(part, columns)
        if part.has_text and whole and not read:
            files = ", ".join(map(str, part.files[:3])) + (" …" if len(part.files) > 3 else "")
            raise JobError(f"data.source: no text in {files}")
        documents += read
    if whole and documents and not data.held_out_source:
        if len(documents) == 1 and len(parts) == 1:
            documents = cut_in_two(documents[0])
        if data.weights is None or names:
            for document in documents:
                works.add({document.work: document.bytes}, 1)
            held_out = choose_held_out(works, names, data.held_out_share)
            documents = [document for document in documents if document.work not in held_out]
    if data.tokenizer and documents and not data.messages_column:
        tokenizer = load_tokenizer(data.tokenizer)
        check_spelling(tokenizer, data.tokenizer, (document.text for document in documents), data.eos_token)


def _documents(part: PartSource, columns: Columns) -> list[Document]:
    """The first documents of a part: all of little text."""
    documents: list[Document] = []
    read: Counter[object] = Counter()
    for batch in read_batches(part.files, columns):
        documents += documents_of(batch, columns)
        read[batch.file] = batch.position
        if read.total() > CHECKED_BYTES:
            break
    return documents
