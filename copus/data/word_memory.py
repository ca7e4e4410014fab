"""Encodes a text part by part, and a part that comes again, as most words do, from memory.

A tokenizer splits a text with a regular expression, and merges nothing across its matches. Where the patterns of the
usual byte-level BPEs begin a match whatever comes before, a text is cut here: before a space that something follows
that is no white space, after a line end between two such characters, and between a letter and what is none in ASCII.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LETTERS = "A-Za-zÀ-ÖØ-öø-ɏΑ-Ωα-ωЀ-ҁ"
_PART = re.compile(
    rf" ?[{_LETTERS}]++(?=[\x00-/:-@\[-`{{-\x7f]|\Z)"  # a word, up to punctuation or white space
    r"|.+?(?= \S|(?<=\S\n)\S|\Z)",  # anything else, up to where a part begins at the latest
    re.DOTALL,
)
_LONGEST, _MOST = 64, 1 << 17
"""Characters of a part, and parts, that are remembered: some 30 MB."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PATTERNS = (_GPT2, _LLAMA3, _LLAMA3.replace("{1,3}", ""))
"""Of GPT-2, Llama 3 and Qwen 2."""


class Parts(dict[str, list[int]]):
    """What a tokenizer makes of parts of texts."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Iterator[int]:
        """The tokens of a text."""
        return itertools.chain.from_iterable(map(self.__getitem__, _PART.findall(text)))

    def __missing__(self, part: str) -> list[int]:
        ids = self._tokenizer.encode(part, add_special_tokens=False).ids
        if len(part) <= _LONGEST:
            if len(self) >= _MOST:
                self.clear()
            self[part] = ids
        return ids


@functools.lru_cache(maxsize=1)
def parts_of(tokenizer: "Tokenizer") -> Parts | None:
    """The memory of a tokenizer; None if it may not be cut so."""
    values = json.loads(tokenizer.to_str(pretty=False))
    can_be_cut = (
        values["model"]["type"] == "BPE"
        and (values["normalizer"] or {}).get("type", "NFC") == "NFC"
        and all(token["special"] for token in values["added_tokens"])
        and _begins_matches(values["pre_tokenizer"] or {})
    )
    return Parts(tokenizer) if can_be_cut else None


def _begins_matches(splitter: dict[str, Any]) -> bool:
    """Whether a tokenizer begins a match wherever a text is cut."""
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if splitter.get("type") == "Sequence":
        first, *rest = splitter["pretokenizers"]
        return (
            first["type"] == "Split"
            and (first["pattern"].get("Regex"), first["behavior"], first["invert"]) in _ISOLATED
            and len(rest) == 1
            and bytes_alone.items() <= rest[0].items()
        )
    return (bytes_alone | {"use_regex": True}).items() <= splitter.items()


_ISOLATED = [(pattern, "Isolated", False) for pattern in _PATTERNS]
