import errno
import json
import os
from pathlib import Path

import pytest
from data_text import held_out_of, read_documents, write_works
from hypothesis import given
from hypothesis import strategies as st

from copus.data.sources import source_files
from copus.job import JobError


def test_folder_is_read_sorted_and_no_file_twice(tmp_path):
    folder = write_works(tmp_path / "plays", beta="b", alpha="a")
    (folder / ".hidden.txt").write_text("no")
    (folder / "notes.pdf").write_text("no")
    (folder / "deep").mkdir()
    (folder / "deep" / "gamma.md").write_text("c")
    documents = read_documents(source_files([folder / "beta.txt", folder]))
    assert [document.name for document in documents] == ["beta.txt", "alpha.txt", "gamma.md"]
    assert [document.work for document in documents] == ["beta", "alpha", "gamma"]


def test_a_subfolder_that_cannot_be_listed_is_refused_and_a_hidden_one_is_not_looked_at(tmp_path, monkeypatch):
    folder, scandir = write_works(tmp_path / "plays", alpha="a"), os.scandir
    for name in ("closed", ".git"):
        (folder / name).mkdir()

    def without_permission(place):
        if Path(place).name in ("closed", ".git"):  # a mode would not stop root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", without_permission)
    with pytest.raises(JobError, match=r"^data\.source: .*/plays/closed: Permission denied$"):
        source_files([folder])
    (folder / "closed").rmdir()
    assert [file.name for file in source_files([folder])] == ["alpha.txt"]


def test_subfolders_that_are_links_are_read_once_and_a_link_to_nothing_is_refused(tmp_path):
    folder = write_works(tmp_path / "plays", alpha="a")
    elsewhere = write_works(tmp_path / "elsewhere", beta="b")
    for name, target in (
        ("linked", elsewhere),
        ("again", elsewhere),
        ("circle", folder),
        ("log", tmp_path / "nowhere"),
    ):
        (folder / name).symlink_to(target)
    assert [str(file.relative_to(folder)) for file in source_files([folder])] == ["again/beta.txt", "alpha.txt"]
    (folder / "gone.md").symlink_to(tmp_path / "nowhere")
    with pytest.raises(JobError, match=r"^data\.source: .*/plays/gone\.md is gone, or a link to nothing$"):
        source_files([folder])


def test_jsonl_may_spell_a_character_as_a_pair_of_surrogates(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text(r'{"text": "\ud83d\ude00"}')
    assert read_documents([file])[0].text == "😀"


def test_jsonl_work_is_the_key_or_the_line(tmp_path):
    file = tmp_path / "corpus.jsonl"
    lines = [{"text": "one", "work": "w"}, {"text": "two"}, {"text": "  "}, {"text": "thrée", "work": "w"}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    documents = read_documents([file])
    assert [(document.work, document.text) for document in documents] == [
        ("w", "one"),
        ("corpus:3", "two"),
        ("w", "thrée"),
    ]
    assert documents[2].bytes == 6


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jl", "a.JSON", "a.jsonlines", "a"])
def test_json_lines_are_read_as_json_lines_whatever_they_are_called(tmp_path, name):
    file = tmp_path / name
    file.write_text('{"text": "one", "id": 7}\n{"text": "two", "work": "w"}\n')
    assert [(document.work, document.text) for document in read_documents([file])] == [("a:1", "one"), ("w", "two")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "one"}]\n', r'a\.json:1: expected an object with a string "text" a line'),
        ('{"title": "one"}\n', r'a\.json:1: expected an object with a string "text" a line'),
        ('{\n "text": "one"\n}\n', r"a\.json:1: not JSON: Expecting property name"),
        ("just a text\n", r"a\.json:1: not JSON"),
        ("[" * 100_000, r"a\.json:1: not JSON"),
    ],
    ids=["an array", "no text", "over several lines", "no JSON", "deep"],
)
def test_other_json_is_refused_and_not_trained_on_as_text(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(JobError, match=message):
        read_documents([tmp_path / "a.json"])


def test_a_folder_gives_its_json_lines_and_not_its_other_json(tmp_path):
    document = '{"text": "one"}\n'
    for name in ("a.jsonl", "b.ndjson", "c.jl", "d.json"):
        (tmp_path / name).write_text(document)
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}\n')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "empty.json").write_text("")
    assert [file.name for file in source_files([tmp_path])] == ["a.jsonl", "b.ndjson", "c.jl", "d.json"]


def test_text_that_looks_like_json_stays_text_in_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text('{"text": "one"}\n')
    assert read_documents([tmp_path / "a.txt"])[0].text == '{"text": "one"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "corpus.jsonl:2: not JSON"),
        ("[1]", 'corpus.jsonl:2: expected an object with a string "text"'),
        ('{"body": "a"}', 'corpus.jsonl:2: expected an object with a string "text"'),
        ('{"text": 3}', 'corpus.jsonl:2: expected an object with a string "text"'),
        ('{"text": "a", "work": 3}', 'corpus.jsonl:2: "work" is not a string, got 3'),
        (r'{"text": "hello \ud83d world"}', 'corpus.jsonl:2: "text" has a lone surrogate, half of a character'),
        (r'{"text": "a", "work": "\ud83d"}', 'corpus.jsonl:2: "work" has a lone surrogate, half of a character'),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, line, message):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(JobError, match=r"data\.source: ") as error:
        read_documents([file])
    assert message in str(error.value)


def test_what_is_missing_empty_or_not_text_is_refused(tmp_path):
    with pytest.raises(JobError, match=r"data\.source: no such file or folder: .*nowhere"):
        source_files([tmp_path / "nowhere"])
    with pytest.raises(JobError, match=r"data\.source: no \.txt.* file in the folder"):
        source_files([tmp_path])
    with pytest.raises(JobError, match=r"data\.source: an empty list"):
        source_files([])
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "caf\udce9.txt").write_text("coffee")
    with pytest.raises(JobError, match=r"data\.source: .*caf.\.txt: the file's name is not UTF-8"):
        source_files([tmp_path / "names"])
    (tmp_path / "blank.txt").write_text(" \n")
    assert read_documents([tmp_path / "blank.txt"]) == []
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(JobError, match=r"latin\.txt: not UTF-8 text: .* at byte 3"):
        read_documents([tmp_path / "latin.txt"])


def test_held_out_names_and_patterns():
    works = dict.fromkeys(["hamlet", "henry_v", "henry_viii", "macbeth"], 100)
    assert held_out_of(works, ["hamlet", "henry_*"]) == {"hamlet", "henry_v", "henry_viii"}
    with pytest.raises(JobError, match=r"data\.held_out: 'hamlt' matches none of the 4 works; did you mean 'hamlet'\?"):
        held_out_of(works, ["macbeth", "hamlt"])
    with pytest.raises(JobError, match=r"data\.held_out: .* takes all 4 works"):
        held_out_of(works, ["h*", "macbeth"])


@pytest.mark.parametrize("name", ["draft [2020]", "what?", "star*", "[a-z]", "*", "a[!b]c"])
def test_an_exact_name_holds_out_that_work_and_no_other(name):
    works = dict.fromkeys(["draft 2", "whatx", "starling", "b", "abc", "axc", name], 100)
    assert held_out_of(works, [name]) == {name}


def test_a_name_is_a_pattern_only_if_no_work_has_it():
    works = dict.fromkeys(["star*", "starling", "start", "draft 2", "draft [2020]"], 100)
    assert held_out_of(works, ["star?*"]) == {"star*", "starling", "start"}
    assert held_out_of(works, ["star*", "draft ?"]) == {"star*", "draft 2"}
    assert held_out_of(works, ["draft [[]2020]"]) == {"draft [2020]"}


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=60))
def test_default_held_out_is_never_empty_all_or_much_more_than_asked(sizes):
    works = {str(number): size for number, size in enumerate(sizes)}
    held_out = held_out_of(works, [])
    assert 0 < len(held_out) < len(works)
    size, total = sum(works[work] for work in held_out), sum(works.values())
    assert size <= 0.1 * total or held_out == {min(works, key=lambda name: (works[name], name))}


def test_default_held_out_covers_five_percent_of_many_works():
    works = {f"work{number}": 100 + number % 7 for number in range(500)}
    size, total = sum(works[work] for work in held_out_of(works, [])), sum(works.values())
    assert 0.05 * total <= size <= 0.055 * total


def test_one_work_cannot_be_held_out():
    with pytest.raises(JobError, match=r"data\.held_out: the source is one work \(poem\)"):
        held_out_of({"poem": 5}, [])


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_a_document_that_is_alone_is_cut_where_something_ends_and_nothing_is_lost(tmp_path, separator):
    text = separator.join(f"sentence {number} of this text." for number in range(400))
    (tmp_path / "novel.txt").write_text(text)
    beginning, end = read_documents([tmp_path / "novel.txt"])
    assert (beginning.work, end.work) == ("novel (beginning)", "novel (end)")
    assert beginning.text + end.text == text
    assert beginning.text.endswith(".")
    assert 0.05 <= end.bytes / len(text) <= 0.1
    assert held_out_of({part.work: part.bytes for part in (beginning, end)}, []) == {"novel (end)"}


def test_a_document_that_cannot_be_cut_stays_whole(tmp_path):
    (tmp_path / "word.txt").write_text("a" * 1000)
    assert [document.work for document in read_documents([tmp_path / "word.txt"])] == ["word"]
