"""What is made of one batch of documents: sizes of works, held-out texts, samples for the tokenizer, and tokens.

Each function takes the `Encoding` of a job and a batch, and may run in any process (`copus.data.worker_processes`).
"""

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from copus.data.chat import encode_conversation
from copus.data.documents import Batch, Columns, Document, cut_in_two, documents_of
from copus.data.held_out import HeldOut
from copus.data.manifest import Dropped, Side
from copus.data.overlap import HeldOutText
from copus.data.tokenizer import encode
from copus.job import JobError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class PartBatch(NamedTuple):
    """A batch, and the part of the blend that it belongs to."""

    part: int
    """Number of the part; those of `data.held_out_source` follow those of `data.source`."""
    batch: Batch
    """The batch."""


@dataclass(frozen=True)
class Encoding:
    """All that it takes to make tokens out of the text of a job. It is sent to other processes."""

    columns: Columns
    """Which columns are read."""
    vocab: int
    """Ids are below it."""
    held_out: tuple[HeldOut, ...] = ()
    """Held-out works of each part."""
    cuts: bool = False
    """Whether the source is one document, which is cut in two."""
    shared_text: tuple[tuple[str, str], ...] = ()
    """Pairs of works that share text; they are not split over the two sides."""
    held_out_text: HeldOutText | None = None
    """What training documents are compared with."""
    tokenizer_json: str = ""
    """The tokenizer."""
    eod: int = 0
    """Id of the token that ends a document."""
    bos: int | None = None
    """Id of the token that begins a document."""
    bos_token: str = ""
    """Its name."""
    eos_token: str = ""
    """Name of the token that ends a document."""
    template: str = ""
    """Template of the conversations."""

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, made once in each process."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer_json)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tokenizer"}

    def side(self, part: int, document: Document) -> Side:
        """The side that a document is on."""
        return "valid" if document.work in self.held_out[part] else "train"

    def documents(self, item: PartBatch) -> list[Document]:
        """The documents of a batch."""
        documents = list(documents_of(item.batch, self.columns))
        return cut_in_two(documents[0]) if self.cuts and len(documents) == 1 and documents[0].is_whole else documents

    def reason_to_drop(self, part: int, document: Document) -> str | None:
        """Why a training document is not trained on; None if it is."""
        for pair in self.shared_text:
            others = [work for work in pair if work != document.work and work in self.held_out[part]]
            if document.work in pair and others:
                return f"shares text with held-out {', '.join(others)}"
        return self.held_out_text.reason_to_drop(document) if self.held_out_text else None


class Sizes(NamedTuple):
    """Sizes of the works of a batch."""

    work_bytes: dict[str, int]
    """Works and their bytes."""
    documents: int
    """Documents that end in the batch."""


def sizes_of(encoding: Encoding, item: PartBatch) -> Sizes:
    """The sizes of a batch's works."""
    work_bytes: Counter[str] = Counter()
    ended = 0
    for document in encoding.documents(item):
        work_bytes[document.work] += document.bytes
        ended += document.ends
    return Sizes(dict(work_bytes), ended)


def held_out_documents(encoding: Encoding, item: PartBatch) -> list[Document]:
    """The documents of a batch that are held out."""
    return [document for document in encoding.documents(item) if encoding.side(item.part, document) == "valid"]


def training_texts(encoding: Encoding, item: PartBatch) -> list[str]:
    """The texts of a batch that are trained on."""
    return [
        document.text
        for document in encoding.documents(item)
        if encoding.side(item.part, document) == "train" and not encoding.reason_to_drop(item.part, document)
    ]


@dataclass
class Encoded:
    """Tokens of the documents of one side in a batch."""

    ids: list[NDArray[np.int64]] = field(default_factory=list)
    """Tokens of each document, or of its piece."""
    said: list[NDArray[np.uint8]] = field(default_factory=list)
    """For conversations, 1 for each token whose loss counts."""
    ends: bool = True
    """Whether the last document is complete."""


@dataclass
class EncodedBatch:
    """What a batch has become."""

    sides: dict[Side, Encoded] = field(default_factory=dict)
    """Tokens by side."""
    dropped: list[Dropped] = field(default_factory=list)
    """Documents that are not trained on."""
    ends_dropped: bool = False
    """Whether the last piece of a long document was dropped, whose earlier pieces may not have been."""
    works: dict[str, tuple[Side, int, int, int]] = field(default_factory=dict)
    """Work → its side, documents, tokens and bytes; a document counts where it ends."""
    largest: int = 0
    """Largest id."""


def encode_batch(encoding: Encoding, item: PartBatch) -> EncodedBatch:
    """The tokens of a batch, and what was dropped. Raises JobError for a text that cannot be encoded."""
    result = EncodedBatch()
    for document in encoding.documents(item):
        side = encoding.side(item.part, document)
        _, documents, tokens, size = result.works.get(document.work, (side, 0, 0, 0))
        reason = encoding.reason_to_drop(item.part, document) if side == "train" else None
        if reason:
            result.dropped.append(Dropped(document=document.name, work=document.work, reason=reason))
            result.ends_dropped = document.ends and not document.is_whole
            result.works[document.work] = (side, documents, tokens, size)
            continue
        ids, said = _tokens(encoding, document)
        if not len(ids):  # a piece of white space, which some tokenizers pass over
            continue
        highest = int(ids.max())
        if highest >= encoding.vocab:
            raise JobError(
                f"data.tokenizer: {document.name} has the token id {highest}, and model.vocab is {encoding.vocab}"
            )
        result.largest = max(result.largest, highest)
        result.works[document.work] = (side, documents + document.ends, tokens + len(ids), size + document.bytes)
        encoded = result.sides.setdefault(side, Encoded())
        encoded.ids.append(ids)
        encoded.ends = document.ends
        if said is not None:
            encoded.said.append(said)
    return result


def _tokens(encoding: Encoding, document: Document) -> tuple[NDArray[np.int64], NDArray[np.uint8] | None]:
    """Tokens of a document or of a piece, and of a conversation which of them are learned."""
    if document.messages:
        names = (encoding.bos_token, encoding.eos_token, encoding.eod, document.name)
        return encode_conversation(encoding.tokenizer, encoding.template, document.messages, *names)
    ids = encode(encoding.tokenizer, document.text, encoding.eod)
    if not document.ends:
        ids = ids[:-1]
    if encoding.bos is not None and document.begins:
        ids = np.concatenate([[encoding.bos], ids])
    return ids, None
