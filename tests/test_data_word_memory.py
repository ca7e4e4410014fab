"""A text that is encoded part by part has the tokens of the whole."""

import functools

import pytest
from data_text import prose
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import copus.data.word_memory as word_memory
from copus.data.word_memory import parts_of

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
NASTY = "".join(
    [
        "aAbBzZsStTmM",  # letters, and those of contractions
        "éÉÀſ×÷ßɏΩα΅;Яяҁ҂ʼªº²½①ٱ漢あ\u0301\u0338\u200d\ufeff\U0001f600\U00010400",  # letters, and what is none
        "019'\"’.,;:!?-_()/\\@[`{~^$%",
        "   \n\n\r\t\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u2028\u202f\u3000\x00\x7f",
    ]
)


@pytest.mark.parametrize("name", SPLITTERS)
@given(text=st.text(alphabet=NASTY, max_size=24))
@example("a\n\n b\n c \n d \n\n e\tf  g   \n\n")
@example("don't DON'T, \"l'homme\"'s; x_y 3,14 e.g. 'tis\r\n\r\n a")
@settings(max_examples=300, deadline=None)
def test_the_tokens_of_the_parts_are_those_of_the_text(name, text):
    tokenizer = _trained(name)
    parts = parts_of(tokenizer)
    assert list(parts.encode(text)) == tokenizer.encode(text, add_special_tokens=False).ids


@given(text=st.text(max_size=24))
@settings(max_examples=300, deadline=None)
def test_the_same_holds_for_any_characters(text):
    tokenizer = _trained("llama3")
    assert list(parts_of(tokenizer).encode(text)) == tokenizer.encode(text, add_special_tokens=False).ids


def test_little_is_remembered(monkeypatch):
    monkeypatch.setattr(word_memory, "_MOST", 10)
    parts = word_memory.Parts(_trained("gpt2"))
    text = prose(3) + " " + "x" * 200
    assert list(parts.encode(text)) == _trained("gpt2").encode(text, add_special_tokens=False).ids
    assert 0 < len(parts) <= 10
    assert max(map(len, parts)) <= 64


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Prepend("▁")),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.NFKC()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda tokenizer: setattr(
            tokenizer,
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
        lambda tokenizer: tokenizer.add_tokens(["a b"]),
    ],
    ids=["prefix", "NFKC", "space before", "Metaspace", "lines", "added token"],
)
def test_another_tokenizer_encodes_the_text_itself(change):
    tokenizer = Tokenizer.from_str(_trained("gpt2").to_str())
    assert parts_of(tokenizer) is not None
    changed = Tokenizer.from_str(_trained("gpt2").to_str())
    change(changed)
    assert parts_of(changed) is None


@functools.cache
def _trained(name):
    """With merges across whatever may be merged, and no special token. NFC, as Qwen has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer.pre_tokenizer = SPLITTERS[name]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=3000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    runs = [f"{a}{b}{c} {b}{a}" for a in NASTY for b in NASTY[:12] + " \n\t.,'" for c in "\n .,sa"]
    tokenizer.train_from_iterator([*(prose(seed) for seed in range(3)), *runs], trainer)
    return tokenizer
