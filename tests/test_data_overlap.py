import re

from data_text import prose
from hypothesis import given
from hypothesis import strategies as st

from copus.data.documents import Document
from copus.data.overlap import HeldOutText, shingles, word_codes

_words = st.lists(st.sampled_from("abc"), max_size=40).map(" ".join)


def _document(text: str, name: str = "training.txt") -> Document:
    return Document(name=name, work=name, text=text)


def _held_out(*texts: str) -> HeldOutText:
    return HeldOutText([_document(text, f"held{number}") for number, text in enumerate(texts)])


def _exact_shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}


@given(_words, _words)
def test_hashed_shingles_count_as_exact_ones_do(first, second):
    ours = [set(shingles(word_codes(text)).tolist()) for text in (first, second)]
    exact = [_exact_shingles(text) for text in (first, second)]
    assert [len(side) for side in ours] == [len(side) for side in exact]
    assert len(ours[0] & ours[1]) == len(exact[0] & exact[1])


@given(st.lists(_words, min_size=1, max_size=4), _words)
def test_a_document_is_dropped_when_a_fifth_of_it_is_held_out(held_out, text):
    own, theirs = _exact_shingles(text), set().union(*map(_exact_shingles, held_out))
    same = bool(text) and text in held_out
    expected = same or (bool(own) and len(own & theirs) / len(own) >= 0.2)
    assert (_held_out(*held_out).reason_to_drop(_document(text)) is not None) == expected


def test_the_same_text_in_other_case_and_punctuation_is_found():
    text = "Now is the winter, of OUR discontent"  # seven words: no shingle at all
    assert _held_out(prose(1), text).reason_to_drop(_document("now is the winter of our discontent!")) == (
        "same text as held-out held1"
    )


def test_a_collection_that_contains_a_held_out_work_is_found():
    collection = "".join(prose(seed) for seed in range(2, 40)) + prose(1)
    reason = _held_out(prose(100), prose(1)).reason_to_drop(_document(collection))
    assert reason == "contains 100% of the 8-grams of held-out held1"


def test_unrelated_text_and_a_common_phrase_are_kept():
    phrase = "once upon a time there was a king who had three daughters"
    held_out = _held_out(prose(1), phrase)
    assert held_out.reason_to_drop(_document(prose(2))) is None
    assert held_out.reason_to_drop(_document(prose(3) + phrase + prose(4))) is None
    assert held_out.reason_to_drop(_document("short")) is None
    assert HeldOutText([]).reason_to_drop(_document(prose(2))) is None
