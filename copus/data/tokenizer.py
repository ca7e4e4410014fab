"""The tokenizer of a job: byte-level BPE trained on the training side, or the user's own `tokenizer.json`.

`tokenizers` and numpy are imported where they are used, so that looking for prepared data stays cheap.
"""

import itertools
import json
import re
import unicodedata
from collections import Counter
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
SPELLED_CHARACTERS = 1_000_000
"""Characters of the training text that a tokenizer has to encode and decode without loss before it is used."""

_CHUNK = 1 << 18  # characters; a text is encoded in pieces of about this size, so that memory stays bounded
_CUT = re.compile(
    r"(?<=\S)\n(?=\S)"
)  # a line end where no byte-level BPE merges across, so that pieces encode as the whole does


def train_tokenizer(
    texts: Iterable[str], vocab: int, special_tokens: tuple[str, ...] = END_OF_DOCUMENT[:1]
) -> "Tokenizer":
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) of exactly `vocab` tokens, the special ones first.

    The same texts give the same tokenizer. Raises JobError if the texts have too few distinct pairs for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special_tokens),
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


def load_tokenizer(path: Path, special_tokens: tuple[str, ...] = END_OF_DOCUMENT) -> "Tokenizer":
    """Read a `tokenizer.json`, without the parts that would change or cut a text: truncation, padding and dropout.

    Tokens that begin or end a document are made special, so that `encode` can tell them from their names in a text.
    Raises JobError.
    """
    from tokenizers import Tokenizer

    try:
        values = json.loads(path.expanduser().read_text(encoding="utf-8"))
        values |= {"truncation": None, "padding": None}
        if "dropout" in values["model"]:
            values["model"]["dropout"] = None
        for token in values.get("added_tokens") or []:
            token["special"] |= token["content"] in special_tokens
        return Tokenizer.from_str(json.dumps(values))
    except OSError as error:
        raise JobError(f"data.tokenizer: cannot read {path}: {error.strerror}") from None
    except Exception as error:  # the library raises nothing more precise
        raise JobError(f"data.tokenizer: cannot read {path}: {brief(error)}") from None


def check_tokenizer(tokenizer: "Tokenizer", path: Path, vocab: int, eos_token: str | None = None) -> int:
    """The id of the token that ends a document, `eos_token` or the first usual one. Raises JobError if there is none,
    or if `vocab` is too small."""
    names = tokenizer.get_vocab(with_added_tokens=True)
    needed = max(names.values(), default=-1) + 1
    if needed > vocab:
        raise JobError(f"data.tokenizer: {path} has ids up to {needed - 1}: {needed} tokens > model.vocab({vocab})")
    if eos_token is not None:
        return token_id(tokenizer, path, eos_token, "data.eos_token")
    for name in END_OF_DOCUMENT:
        if name in names:
            return int(names[name])
    raise JobError(f"data.tokenizer: {path} has no token that ends a document: one of {', '.join(END_OF_DOCUMENT)}")


def token_id(tokenizer: "Tokenizer", path: Path, name: str, setting: str) -> int:
    """The id of a token that a setting names. Raises JobError if there is no such token."""
    number = tokenizer.token_to_id(name)
    if number is None:
        raise JobError(f"{setting}({name}): {path} has no such token")
    return int(number)


def check_spelling(tokenizer: "Tokenizer", path: Path, texts: Iterable[str], eos_token: str | None = None) -> None:
    """Raise JobError if the first million characters of the training text do not survive encoding and decoding.

    The tokenizer's normalizer may change them (case, accents), and white space and control characters may go. Every
    other character has to be there: one without a token is not, and one that becomes the unknown token is not either.
    """
    eod = check_tokenizer(tokenizer, path, 2**31, eos_token)
    lost: Counter[str] = Counter()
    total, left = 0, SPELLED_CHARACTERS
    for text in texts:
        sample = text[:left]
        left -= len(sample)
        total += _visible(sample).total()
        decoded = tokenizer.decode(encode(tokenizer, sample, eod)[:-1].tolist())
        lost += _lost(tokenizer, sample, decoded)
        if left == 0:
            break
    if lost:
        raise JobError(
            f"data.tokenizer: {path} loses {lost.total()} of the first {total} characters of the training text, such "
            f"as {', '.join(repr(character) for character, _ in lost.most_common(3))}: it has no tokens to spell them "
            "with; use one with byte fallback, or leave data.tokenizer out"
        )


def _lost(tokenizer: "Tokenizer", text: str, decoded: str) -> Counter[str]:
    """The characters of a text that are missing from what was decoded."""
    remaining = _visible(decoded)
    lost = _visible(text) - remaining
    if lost and tokenizer.normalizer:
        normalized = _visible(tokenizer.normalizer.normalize_str(text)) - remaining
        lost = min(lost, normalized, key=Counter.total)
    return lost


def _visible(text: str) -> Counter[str]:
    """The compatible, lower-case characters (NFKC) of a text, without white space and control characters."""
    text = unicodedata.normalize("NFKC", text.replace("▁", " ")).casefold()  # "▁" is SentencePiece's space
    counts = Counter(text)
    for character in [*counts]:
        if unicodedata.category(character).startswith(("Z", "Cc")):
            del counts[character]
    return counts


def encode(tokenizer: "Tokenizer", text: str, eod: int) -> "NDArray[np.int64]":
    """The tokens of a document, the end-of-document token last and nowhere else.

    The name of a special token inside the text is text. Raises JobError if the tokenizer cannot encode the text, or if
    a single character becomes the end of a document.
    """
    import numpy as np

    tokenizer.encode_special_tokens = True
    try:
        encodings = tokenizer.encode_batch_fast(list(pieces(text)), add_special_tokens=False)
        ids = np.concatenate([*(np.array(piece.ids, dtype=np.int64) for piece in encodings), np.array([eod])])
        if (ids[:-1] == eod).any():
            ids = np.array([*(token for piece in pieces(text) for token in _without_ends(tokenizer, piece, eod)), eod])
    except JobError:
        raise
    except Exception as error:  # a word or a character without a token, and no unknown token either
        raise JobError(f"data.tokenizer: cannot encode the training text: {brief(error)}") from None
    return ids


def _without_ends(tokenizer: "Tokenizer", text: str, eod: int) -> list[int]:
    """The tokens of a text whose tokenizer makes ends of documents out of parts of it, without these ends.

    Such a part is cut in two after its first character, and the halves are encoded on their own.
    """
    ids: list[int] = []
    parts = [text]
    while parts:
        part = parts.pop()
        encoding = tokenizer.encode(part, add_special_tokens=False)
        ends = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == eod]
        for first, last in ends:
            if last - first < 2:
                raise JobError(
                    f"data.tokenizer: {part[first:last]!r} in the text becomes the token that ends a document"
                )
        if ends:
            cuts = [0, *(first + 1 for first, _ in ends), len(part)]
            parts += [part[first:last] for first, last in reversed(list(itertools.pairwise(cuts)))]
        else:
            ids += encoding.ids
    return ids


def brief(error: Exception) -> str:
    """What an error of a library says, on one line."""
    return " ".join(str(error).split())[:200]


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of about 256 ki characters, cut at line ends."""
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _CHUNK)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end
