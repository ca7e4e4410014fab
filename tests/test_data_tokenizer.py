from pathlib import Path

import pytest
from data_text import prose
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import copus.data.tokenizer as tokenizer_module
from copus.data.tokenizer import check_spelling, check_tokenizer, encode, load_tokenizer, pieces, train_tokenizer
from copus.job import JobError

TEXTS = [prose(seed) for seed in range(5)]


def test_training_is_deterministic_and_exact():
    first, second = train_tokenizer(TEXTS, 400), train_tokenizer(iter(TEXTS), 400)
    assert first.to_str() == second.to_str()
    assert sorted(first.get_vocab().values()) == list(range(400))
    assert first.token_to_id("<|endoftext|>") == 0


@given(st.text())
def test_any_text_survives_and_only_its_end_is_the_end(text):
    tokenizer = _trained()
    ids = encode(tokenizer, text, 0)
    assert ids[-1] == 0
    assert 0 not in ids[:-1]
    assert tokenizer.decode(ids[:-1].tolist()) == text


def test_the_name_of_the_end_token_inside_a_text_is_text():
    ids = encode(_trained(), "a<|endoftext|>b", 0)
    assert ids[-1] == 0
    assert 0 not in ids[:-1]


@given(st.text(alphabet="ab'. \n\té", max_size=60), st.integers(1, 10))
def test_pieces_encode_as_the_whole_does(text, size):
    tokenizer = _trained()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_CHUNK", size)
        assert "".join(pieces(text)) == text
        in_pieces = encode(tokenizer, text, 0)
    assert in_pieces.tolist() == [*tokenizer.encode(text).ids, 0]


def test_long_text_is_cut(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_CHUNK", 100)
    assert len(list(pieces(TEXTS[0]))) > len(TEXTS[0]) / 200


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(JobError, match=r"model\.vocab\(4096\): .* no more than 259 byte-pair tokens; use at most 259"):
        train_tokenizer(["abab"], 4096)  # ab, abab


def test_a_users_tokenizer_needs_room_and_an_end(tmp_path):
    path = tmp_path / "tokenizer.json"
    _trained().save(str(path))
    assert check_tokenizer(load_tokenizer(path), path, 400) == 0
    with pytest.raises(JobError, match=r"tokenizer\.json has ids up to 399: 400 tokens > model\.vocab\(399\)"):
        check_tokenizer(load_tokenizer(path), path, 399)
    endless = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(
        JobError, match=r"no token that ends a document: one of <\|endoftext\|>, </s>, <\|end_of_text\|>"
    ):
        check_tokenizer(endless, path, 400)
    endless.add_special_tokens(["</s>"])
    assert check_tokenizer(endless, path, 400) == 2


def _saved(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """A tokenizer as it comes back from a user's file."""
    tokenizer.save(str(path))
    return load_tokenizer(path)


def test_truncation_padding_and_dropout_of_a_users_tokenizer_are_switched_off(tmp_path):
    expected = encode(_trained(), TEXTS[0], 0).tolist()
    mine = train_tokenizer(TEXTS, 400)
    mine.enable_truncation(64)
    mine.enable_padding(length=8192, pad_id=0, pad_token="<|endoftext|>")
    mine.model.dropout = 0.5
    assert len(mine.encode(TEXTS[0]).ids) == 8192
    loaded = _saved(mine, tmp_path / "tokenizer.json")
    assert encode(loaded, TEXTS[0], 0).tolist() == expected
    assert '"dropout":null' in loaded.to_str(), "what is kept with the data is what it was encoded with"


def _words(*words: str, unknown: str | None = None) -> Tokenizer:
    names = dict.fromkeys([*words, "</s>"])
    tokenizer = Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, unk_token=unknown or ""))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize("kind", ["an added token that is not special", "a word", "a word in lower case", "merged"])
def test_no_text_becomes_the_end_of_a_document(tmp_path, kind):
    """200 times the name of the end token in a text, however the tokenizer comes to have that token: one end."""
    text = "a </s> b " * 200
    if kind == "an added token that is not special":
        tokenizer = _bytes_with("[PAD]")
        tokenizer.add_tokens([AddedToken("</s>", special=False, normalized=False)])
    elif kind == "merged":
        tokenizer = Tokenizer(models.BPE(_letters("ab</s>", "</s>"), [("<", "/"), ("</", "s"), ("</s", ">")]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = _words("a", "b", "<", "/s>")
        if kind == "a word in lower case":
            tokenizer.normalizer = normalizers.Lowercase()
            text = text.upper()
    loaded = _saved(tokenizer, tmp_path / "tokenizer.json")
    eod = check_tokenizer(loaded, tmp_path, 1000)
    ids = encode(loaded, text, eod)
    assert ids.tolist().count(eod) == 1
    assert ids[-1] == eod
    decoded = loaded.decode(ids[:-1].tolist(), skip_special_tokens=False).replace(" ", "")
    assert decoded == text.lower().replace(" ", "")


def _letters(letters: str, *merged: str) -> dict[str, int]:
    """A vocabulary of letters and everything that merges to the given tokens from the left."""
    prefixes = [token[:end] for token in merged for end in range(2, len(token) + 1)]
    return {token: id for id, token in enumerate(dict.fromkeys([*letters, *prefixes]))}


def _bytes_with(special: str) -> Tokenizer:
    """Byte-level BPE without an end-of-document token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def test_an_unknown_token_that_is_the_end_token_is_refused(tmp_path):
    loaded = _saved(_words("a", unknown="</s>"), tmp_path / "tokenizer.json")
    with pytest.raises(JobError, match=r"data\.tokenizer: 'q' in the text becomes the token that ends a document"):
        encode(loaded, "a q a", 1)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: Tokenizer(models.BPE(_letters("ab </s>", "</s>"), [])), "loses 3 of the first 7 .* such as 'é', 'c'"),
        (lambda: _words("ab", "abé"), "cannot encode the training text: WordLevel error: Missing .* token"),
        (lambda: _words("ab", "[UNK]", unknown="[UNK]"), "loses 3 of the first 7 characters"),
        (lambda: Tokenizer(models.Unigram([("a", -1.0), ("</s>", -1.0)])), "cannot encode the training text: .*unk_id"),
    ],
    ids=["BPE without unk", "WordLevel without unk", "WordLevel with unk", "Unigram without unk"],
)
def test_a_tokenizer_that_drops_characters_is_refused(tmp_path, tokenizer, message):
    path = tmp_path / "tokenizer.json"
    loaded = _saved(tokenizer(), path)
    if isinstance(loaded.model, models.WordLevel) and loaded.token_to_id("[UNK]"):
        loaded.add_special_tokens(["[UNK]"])
    with pytest.raises(JobError, match=f"data\\.tokenizer: .*{message}") as error:
        check_spelling(loaded, path, ["ab", "", "ab éé c"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["bytes", "lower case without accents", "SentencePiece", "words", "without a decoder"])
def test_a_tokenizer_that_can_spell_the_text_is_taken_whatever_it_normalizes(tmp_path, kind):
    texts = ["Ça alors! \tna\u0308ive ﬁnish\r\n  two  spaces", "the END\n" * 3]
    if kind == "words":
        tokenizer = _words(*" ".join(texts).split())
    elif kind == "SentencePiece":
        pieces = dict.fromkeys("▁" + "".join(texts).replace(" ", ""))
        tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((p, -1.0) for p in pieces)], unk_id=0))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer = _bytes_with("</s>")
        if kind == "lower case without accents":
            steps = [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
            tokenizer.normalizer = normalizers.Sequence(steps)
        if kind == "without a decoder":
            texts = ["the END\n" * 3]
            tokenizer.decoder = None
    path = tmp_path / "tokenizer.json"
    check_spelling(_saved(tokenizer, path), path, texts)


def test_only_the_first_million_characters_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "SPELLED_CHARACTERS", 10)
    loaded = _saved(Tokenizer(models.BPE(_letters("ab</s>", "</s>"), [])), tmp_path / "tokenizer.json")
    check_spelling(loaded, tmp_path, ["abab", "ababab", "éé"])
    with pytest.raises(JobError, match="loses 1 of the first 10 characters of the training text, such as 'é'"):
        check_spelling(loaded, tmp_path, ["abab", "ababaé", "éé"])


def test_unreadable_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in (
        None,
        "{",
        "[]",
        '"text"',
        '{"model": {}}',
        '{"model": []}',
        '{"model": {"type": "BPE"}, "added_tokens": [1]}',
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(JobError, match=r"data\.tokenizer: cannot read .*tokenizer\.json: ") as error:
            load_tokenizer(path)
        assert "\n" not in str(error.value)


_cached: list[Tokenizer] = []


def _trained() -> Tokenizer:
    if not _cached:
        _cached.append(train_tokenizer(TEXTS, 400))
    return _cached[0]
