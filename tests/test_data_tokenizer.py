import pytest
from data_text import prose
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

import copus.data.tokenizer as tokenizer_module
from copus.data.tokenizer import check_tokenizer, encode, load_tokenizer, pieces, train_tokenizer
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


def test_unreadable_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in (None, "{", '{"model": {}}'):
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
