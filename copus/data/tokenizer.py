"""The tokenizer of a job: byte-level BPE trained on the training side, or a `tokenizer.json` of the user's.

`tokenizers` and numpy are imported where they are used, so that a look at whether data is prepared stays cheap.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from copus.job import JobError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>")
"""Names of the end-of-document token, in the order in which a tokenizer is searched for them. Ours has the first."""
SMALLEST_VOCAB = 257
"""The 256 bytes and the end-of-document token."""

_CHUNK = 1 << 18  # characters; a text is worked on in pieces of about this size, so that memory stays bounded
_CUT = re.compile(
    r"(?<=\S)\n(?=\S)"
)  # a line end where no byte-level BPE merges across, so that pieces encode as the whole does


def train_tokenizer(texts: Iterable[str], vocab: int) -> "Tokenizer":
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) of exactly `vocab` tokens; token 0 ends a document.

    The same texts give the same tokenizer. Raises JobError when the texts have too few distinct pairs for so many
    tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_DOCUMENT[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    tokens = tokenizer.get_vocab_size()
    if tokens != vocab:
        raise JobError(
            f"model.vocab({vocab}): the training text has no more than {tokens} byte-pair tokens; use at most {tokens}"
        )
    return tokenizer


def load_tokenizer(path: Path) -> "Tokenizer":
    """Read a `tokenizer.json`. Raises JobError."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(os.fspath(path.expanduser()))
    except Exception as error:  # the library raises nothing more precise, for a missing file either
        raise JobError(f"data.tokenizer: cannot read {path}: {' '.join(str(error).split())[:200]}") from None


def check_tokenizer(tokenizer: "Tokenizer", path: Path, vocab: int) -> int:
    """The id of the end-of-document token. Raises JobError when there is none, or when `vocab` is too small."""
    names = tokenizer.get_vocab(with_added_tokens=True)
    needed = max(names.values(), default=-1) + 1
    if needed > vocab:
        raise JobError(f"data.tokenizer: {path} has ids up to {needed - 1}: {needed} tokens > model.vocab({vocab})")
    for name in END_OF_DOCUMENT:
        if name in names:
            return int(names[name])
    raise JobError(f"data.tokenizer: {path} has no token that ends a document: one of {', '.join(END_OF_DOCUMENT)}")


def encode(tokenizer: "Tokenizer", text: str, eod: int) -> "NDArray[np.int64]":
    """The tokens of a document, the end-of-document token last.

    A special token's name inside the text is text: nothing but the end of a document is encoded as its end.
    """
    import numpy as np

    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch_fast(list(pieces(text)), add_special_tokens=False)
    return np.concatenate([*(np.array(piece.ids, dtype=np.int64) for piece in encodings), np.array([eod])])


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of about 256 ki characters, cut at line ends."""
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _CHUNK)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end
