"""Sources of every format, blends of them, and preparation in bounded memory that can be killed."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet as parquet
import pytest
from data_text import make_job, prose, read_documents, write_indexed, write_works
from hypothesis import given
from hypothesis import strategies as st

import copus.data.documents as documents_module
import copus.data.text_pipeline as pipeline_module
from copus.data.blend import LONGEST_PERIOD, Blend
from copus.data.documents import Columns
from copus.data.indexed import IndexedDocuments
from copus.data.manifest import read_manifest
from copus.data.overlap import HeldOutText
from copus.data.prepare import prepare
from copus.data.prepared import check_data, data_folder
from copus.data.samples import SampleReader
from copus.data.sources import source_files
from copus.data.tokenizer import train_tokenizer
from copus.job import JobConfig, JobError, dump_job

TEXTS = [prose(seed) for seed in range(4)]


def _write_table(path: Path, rows: dict[str, list[Any]]) -> None:
    table = pyarrow.table(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)


def _save_as_datasets_does(folder: Path) -> Path:
    """The files of `Dataset.save_to_disk`."""
    folder.mkdir()
    halves = {"data-00000-of-00002.arrow": TEXTS[:2], "data-00001-of-00002.arrow": TEXTS[2:]}
    for name, texts in halves.items():
        _write_table(folder / name, {"text": texts, "id": list(range(2))})
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in halves]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def _source(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"corpus{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == ".jsonl.zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines)
    elif kind == "datasets":
        _save_as_datasets_does(path)
    else:
        _write_table(path, {"text": TEXTS, "id": list(range(4))})
    return path


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet", "datasets"])
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    path = _source(tmp_path, kind)
    assert [document.text for document in read_documents(source_files([path]))] == TEXTS
    if kind == ".parquet":
        assert [document.text for document in read_documents(source_files([tmp_path]))] == TEXTS, "also in a folder"


def test_the_column_of_the_text_has_a_name(tmp_path: Path) -> None:
    _write_table(tmp_path / "a.parquet", {"title": ["x"], "body": ["the text"], "work": ["w"]})
    (document,) = read_documents([tmp_path / "a.parquet"], Columns("body"))
    assert (document.text, document.work, document.name) == ("the text", "w", "a:1")
    (tmp_path / "a.jsonl").write_text('{"body": "the text"}\n')
    assert read_documents([tmp_path / "a.jsonl"], Columns("body"))[0].text == "the text"
    with pytest.raises(JobError, match=r"a\.parquet: there is no column 'text' \(data\.text_column\) in it; it has ti"):
        read_documents([tmp_path / "a.parquet"])
    with pytest.raises(JobError, match=r'a\.jsonl:1: expected an object with a string "text" a line'):
        read_documents([tmp_path / "a.jsonl"])


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet", "datasets"])
def test_a_file_that_is_cut_short_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = _source(tmp_path, kind)
    file = path / "data-00001-of-00002.arrow" if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:-20] if kind != "datasets" else b"nothing")
    job = make_job(tmp_path / "cache", {"source": [str(path)]})
    with pytest.raises(JobError, match=rf"data\.source: {file}: ") as error:
        check_data(job)
    assert "\n" not in str(error.value)
    with pytest.raises(JobError, match=rf"data\.source: {file}: "):
        prepare(job)
    assert not job.data.cache.exists()


def test_a_long_text_comes_in_pieces_and_none_of_it_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(prose(seed) for seed in range(40))
    (tmp_path / "long.txt").write_text(text)
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer([text], 300).save(str(tokenizer))

    def prepared(cache: str) -> bytes:
        data = {"source": [str(tmp_path / "long.txt"), str(tmp_path / "other.txt")], "tokenizer": str(tokenizer)}
        folder = prepare(make_job(tmp_path / cache, {**data, "held_out": ["other"]}))
        assert len(IndexedDocuments(folder / "train")) == 1, "one document, with one end"
        return (folder / "train.bin").read_bytes()

    (tmp_path / "other.txt").write_text(prose(100))
    whole = prepared("whole")
    monkeypatch.setattr(documents_module, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(documents_module, "_SMALLEST_PIECE", 1_000)
    assert len(list(documents_module.read_batches([tmp_path / "long.txt"], Columns()))) > 10
    assert prepared("pieces") == whole

    alone = prepare(make_job(tmp_path / "alone", {"source": [str(tmp_path / "long.txt")]}))
    manifest = read_manifest(alone)
    assert [work.name for work in manifest.works] == ["long (beginning)", "long (end)"]
    assert 0.05 <= manifest.works[1].bytes / len(text) <= 0.11
    assert sum(work.bytes for work in manifest.works) == len(text)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 500))
def test_a_blend_has_every_share_to_within_one_sample_at_every_prefix(weights: list[int], samples: int) -> None:
    blend = Blend(weights)
    taken = blend.taken(samples)
    assert sum(taken) == samples
    for count, weight in zip(taken, weights, strict=True):
        assert abs(count - samples * weight / sum(weights)) < 1
    places = [blend.locate(sample) for sample in range(samples)]
    for dataset, count in enumerate(taken):
        assert [index for of, index in places if of == dataset] == list(range(count)), "each of its samples, in order"


def test_weights_are_exact_as_they_are_written_or_to_five_digits() -> None:
    assert Blend([0.7, 0.3]).weights == (7, 3)
    assert Blend([2, 4]).weights == (1, 2)
    assert Blend([0.1, 0.123456789, 1e-9]).weights[2] == 1
    assert Blend([1 / 3, 2 / 3]).period <= LONGEST_PERIOD + 2
    for weights in ([], [0.0, 1.0], [-1.0], [float("inf")]):
        with pytest.raises(ValueError, match="positive"):
            Blend(weights)


def test_the_shares_are_those_of_megatrons_blend() -> None:
    from copus.backends.megatron import cpu

    cpu.before_import()
    from megatron.core.datasets import helpers

    weights = np.array([0.5, 0.3, 0.15, 0.05])
    theirs, index = np.zeros(1000, np.int16), np.zeros(1000, np.int64)
    helpers.build_blending_indices(theirs, index, weights, 4, 1000, False)
    blend = Blend(weights.tolist())
    ours = np.array([blend.locate(sample)[0] for sample in range(1000)])
    for dataset in range(4):
        difference = np.cumsum(ours == dataset) - np.cumsum(theirs == dataset)
        assert abs(difference).max() <= 1


def _prefix(folder: Path, name: str, lengths: list[int], first_id: int) -> Path:
    """An indexed dataset in which each dataset has ids of its own."""
    folder.mkdir(exist_ok=True)
    ends = first_id + np.cumsum([0, *lengths])
    documents = [np.arange(start, end) for start, end in itertools.pairwise(ends)]
    write_indexed(folder / name, documents, 60_000)
    return folder / name


@pytest.fixture
def prefixes(tmp_path: Path) -> list[Path]:
    return [
        _prefix(tmp_path / "indexed", "a.text_document", [200] * 20, 0),
        _prefix(tmp_path / "indexed", "b", [100] * 10, 10_000),
    ]


def _blend_job(tmp_path: Path, prefixes: list[Path], **data: Any) -> JobConfig:
    return make_job(tmp_path / "cache", {"source": list(map(str, prefixes)), **data}, vocab=60_000)


def test_a_blend_of_prefixes_is_read_in_exact_shares_and_copied_nowhere(tmp_path: Path, prefixes: list[Path]) -> None:
    folder = prepare(_blend_job(tmp_path, prefixes, weights=[0.25, 0.75], held_out_share=0.1))
    assert (folder / "data-0.bin").is_symlink()
    manifest = read_manifest(folder)
    assert [(part.side, part.slice.tokens, part.weight) for part in manifest.parts] == [
        *(("train", 3600, 0.25), ("valid", 400, 0.25)),
        *(("train", 900, 0.75), ("valid", 100, 0.75)),
    ]
    reader = SampleReader(folder, "train", 32, 400, 5)
    tokens = reader.batch(0, 400)[0]
    from_b = (tokens[:, 0] >= 10_000).numpy()
    assert np.abs(np.cumsum(from_b) - 0.75 * np.arange(1, 401)).max() <= 1
    assert int(tokens[~from_b].max()) < 3600, "nothing held out"
    b = tokens[from_b][:28]
    assert len(set(b.flatten().tolist())) == 28 * 32, "a pass over a dataset repeats nothing"
    again = SampleReader(folder, "train", 32, 90, 5, cache=tmp_path / "elsewhere")
    for first, count in ((0, 7), (7, 64), (71, 19)):
        assert (again.batch(first, count)[0] == tokens[first : first + count]).all()


def test_without_weights_prefixes_are_blended_by_their_size(tmp_path: Path, prefixes: list[Path]) -> None:
    folder = prepare(_blend_job(tmp_path, [prefixes[0].with_name("a.text_document.bin"), prefixes[1]]))
    weights = [part.weight for part in read_manifest(folder).parts if part.side == "train"]
    assert weights == [3800, 900], "5 % of the documents are held out, at least one"


def test_validation_may_have_sources_of_its_own(tmp_path: Path, prefixes: list[Path]) -> None:
    folder = prepare(_blend_job(tmp_path, prefixes[:1], held_out_source=[str(prefixes[1])]))
    assert [(part.side, part.slice.tokens) for part in read_manifest(folder).parts] == [
        ("train", 4000),
        ("valid", 1000),
    ]
    assert int(SampleReader(folder, "valid", 32, 20, 0).batch(0, 20)[0].min()) >= 10_000

    text = write_works(tmp_path / "text", one=prose(1), two=prose(2), copy=prose(9))
    other = write_works(tmp_path / "held out", nine=prose(9))
    folder = prepare(make_job(tmp_path / "cache", {"source": [str(text)], "held_out_source": [str(other)]}))
    manifest = read_manifest(folder)
    assert [dropped.document for dropped in manifest.dropped] == ["copy.txt"], "it is compared with what is held out"
    assert {work.name: work.side for work in manifest.works if work.tokens} == {
        "one": "train",
        "two": "train",
        "nine": "valid",
    }


def test_a_blend_of_texts_has_a_dataset_for_each(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 10)):
        write_works(tmp_path / name, **{f"{name}{seed}": prose(first + seed) for seed in range(4)})
    data = {"source": [str(tmp_path / "a"), str(tmp_path / "b")], "weights": [3, 1]}
    folder = prepare(make_job(tmp_path / "cache", data))
    manifest = read_manifest(folder)
    assert sorted(manifest.files) == sorted(
        [f"{side}-{part}.{kind}" for side in ("train", "valid") for part in (0, 1) for kind in ("bin", "idx")]
        + ["tokenizer.json"]
    )
    assert [part.weight for part in manifest.parts] == [3, 3, 1, 1]
    other = prepare(make_job(tmp_path / "cache", {**data, "weights": [1, 3]}))
    assert other != folder, "the weights are a part of the data"


def _spoil(prefix: Path, what: str) -> None:
    index = prefix.with_name(prefix.name + ".idx")
    content = bytearray(index.read_bytes())
    if what == "mark":
        content[:4] = b"nope"
    elif what == "cut":
        del content[-9:]
    elif what == "type":
        content[17] = 6
    elif what == "place":
        content[34 + 4 * 10 + 8 * 9 : 34 + 4 * 10 + 8 * 10] = (10**9).to_bytes(8, "little")
    index.write_bytes(content)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mark", r"b\.idx: not an index of Megatron's indexed dataset, version 1"),
        ("cut", r"b\.idx: 10 sequences take 242 bytes, and the file has 233"),
        ("type", r"b\.idx: ids of type code 6 are not tokens"),
        ("place", r"b\.idx: document 9 of 100 tokens at byte 1000000000 is not in b\.bin, which has 2000 bytes"),
    ],
)
def test_a_broken_index_is_refused_in_one_line(tmp_path: Path, prefixes: list[Path], what: str, message: str) -> None:
    _spoil(prefixes[1], what)
    job = _blend_job(tmp_path, prefixes)
    with pytest.raises(JobError, match=message):
        prepare(job)
    assert not job.data.cache.exists()


def test_ids_beyond_the_vocabulary_and_halves_of_a_dataset_are_refused(tmp_path: Path, prefixes: list[Path]) -> None:
    job = make_job(tmp_path / "cache", {"source": list(map(str, prefixes))}, vocab=10_500)
    with pytest.raises(JobError, match=r"b\.bin has the token id 10999, and model\.vocab is 10500"):
        prepare(job)
    assert not job.data.cache.exists()
    prefixes[1].with_name("b.idx").unlink()
    with pytest.raises(JobError, match=r"b\.bin is half of an indexed dataset: b\.idx is missing"):
        check_data(_blend_job(tmp_path, [prefixes[1].with_name("b.bin")]))
    one = _prefix(tmp_path / "one", "c", [500], 0)
    with pytest.raises(JobError, match=r"c has 1 documents: none is left to train on"):
        prepare(_blend_job(tmp_path, [one]))
    mixed = [prefixes[0], write_works(tmp_path / "text", w=prose(1))]
    with pytest.raises(JobError, match=r"text beside datasets that are tokenized already: name their tokenizer"):
        check_data(_blend_job(tmp_path, mixed))


@pytest.mark.parametrize(
    "data",
    [
        {"messages_column": "messages"},
        {"text_column": "content"},
        {"held_out": ["hamlet"]},
        {"bos_token": "<s>"},
        {"eos_token": "</s>"},
    ],
)
def test_settings_of_text_are_refused_where_there_is_none(
    tmp_path: Path, prefixes: list[Path], data: dict[str, Any]
) -> None:
    job = make_job(tmp_path / "cache", {"source": list(map(str, prefixes)), **data}, vocab=11_000)
    with pytest.raises(JobError, match=rf"data\.{next(iter(data))}\(.*\) is for text, and data\.source has none"):
        check_data(job)
    text = write_works(tmp_path / "text", hamlet=prose(1), other=prose(2))
    mixed = make_job(tmp_path / "cache", {"source": [str(prefixes[0]), str(text)], **data}, vocab=11_000)
    with pytest.raises(JobError, match="name their tokenizer"):
        check_data(mixed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights": [1.0]}, r"data: weights: 1 weights for the 2 entries of source"),
        ({"weights": [1.0, 0.0]}, r"data\.weights\.1: input should be greater than 0, got 0"),
        ({"weights": [1.0, -2.0]}, r"data\.weights\.1: input should be greater than 0, got -2"),
        ({"held_out": ["a"], "held_out_share": 0.1}, r"held_out and held_out_share both say what is held out"),
        ({"chat_template": "x"}, r"chat_template is for conversations: give messages_column too"),
        (
            {"messages_column": "m", "text_column": "t"},
            r"text_column\(t\) and messages_column\(m\) both say what is read",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        make_job(tmp_path, {"source": ["a", "b"], **data})


def test_of_much_held_out_text_a_part_of_the_shingles_finds_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = read_documents_of(range(60))
    monkeypatch.setattr("copus.data.overlap.MOST_SHINGLES", 3_000)
    held_out = HeldOutText(documents)
    assert held_out._hashes.size <= 3_000 < 60 * 390 / 2
    half = documents[7].text[: len(documents[7].text) // 2]
    assert held_out.reason_to_drop(documents[7]) == "same text as held-out 7"
    assert "held-out" in (held_out.reason_to_drop(read_documents_of([200], before=half)[0]) or "")
    assert all(held_out.reason_to_drop(document) is None for document in read_documents_of(range(300, 340)))


def read_documents_of(seeds: Any, before: str = "") -> list[documents_module.Document]:
    return [documents_module.Document(str(seed), str(seed), before + prose(seed)) for seed in seeds]


def _write_lines(path: Path, megabytes: float) -> Path:
    """JSON lines of so much text, made of a vocabulary of some thousand words."""
    words = np.array(prose(1, 4000).split())
    random = np.random.default_rng(1)
    with open(path, "w") as file:
        written = 0
        while written < megabytes * 1e6:
            text = " ".join(words[random.integers(0, len(words), 400)])
            written += file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.mark.dist
def test_several_processes_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write_lines(tmp_path / "a.jsonl", 3)
    one = prepare(make_job(tmp_path / "one", {"source": [str(path)]}))
    monkeypatch.setattr(documents_module, "BATCH_BYTES", 300_000)
    monkeypatch.setattr(pipeline_module, "IN_PROCESS_BYTES", 0)
    two = prepare(make_job(tmp_path / "two", {"source": [str(path)], "processes": 2}))
    assert one.name == two.name, "its name is a hash of its content"


def test_processes_do_not_outlive_one_that_is_killed() -> None:
    """Idle ones too, which nothing but the death of the first could end."""
    code = (
        "import multiprocessing, operator, time; from copus.data.worker_processes import ordered_map\n"
        "results = ordered_map(operator.add, 1, range(100), 2); next(results)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True); time.sleep(600)"
    )
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL  # multiprocessing warns of semaphores that it clears away
    first = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=nowhere, text=True)
    assert first.stdout is not None
    others = [psutil.Process(int(pid)) for pid in first.stdout.readline().split()]
    assert len(others) == 2
    first.kill()
    first.wait()
    end = time.monotonic() + 60
    while any(other.is_running() and other.status() != psutil.STATUS_ZOMBIE for other in others):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.dist
def test_a_preparation_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    path = _write_lines(tmp_path / "a.jsonl", 6)
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer([prose(1, 4000)], 300).save(str(tokenizer))
    job = make_job(tmp_path / "cache", {"source": [str(path)], "tokenizer": str(tokenizer), "processes": 1})
    (tmp_path / "job.yaml").write_text(dump_job(job))
    code = (
        "import sys, copus.data.text_pipeline as p, copus.data.documents as d; p._SECONDS_BETWEEN_NOTES = 0\n"
        "d.BATCH_BYTES = 200_000\n"
        "from copus.data.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job.yaml")], stderr=subprocess.DEVNULL)
    notes = lambda: list(data_folder(job).glob(".making-*/progress.json"))  # noqa: E731
    while process.poll() is None and not notes():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (note,) = notes()
    noted = json.loads(note.read_text())["batches"]
    assert noted > 0
    skipped = []
    folder = data_folder(job)
    real = pipeline_module.ordered_map

    def counting(function: Any, context: Any, items: Any, processes: int) -> Any:
        items = list(items)
        if function is pipeline_module.encode_batch:
            skipped.append(len(items))
        return real(function, context, items, processes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "BATCH_BYTES", 200_000)
        total = len(list(documents_module.read_batches([path], Columns())))
        patch.setattr(pipeline_module, "ordered_map", counting)
        resumed = prepare(job)
    assert skipped == [total - noted], "what was noted is not done again"
    assert {entry.name for entry in folder.iterdir()} == {resumed.name, "inputs"}
    assert (
        prepare(make_job(tmp_path / "anew", {"source": [str(path)], "tokenizer": str(tokenizer)})).name == resumed.name
    )


_LIMITED = """
import resource, sys
from pathlib import Path
from copus.data.prepare import prepare
from copus.job import load_job
prepare(load_job(Path(sys.argv[2])))
rss = lambda who: resource.getrusage(who).ru_maxrss << 10
print(max(rss(resource.RUSAGE_SELF), rss(resource.RUSAGE_CHILDREN)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["its own", "the job's"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, tokenizer: str) -> None:
    """200 MB of text and 20 MB: the peak of any process grows by less than 100 MB."""
    peaks = []
    for megabytes in (20, 200):
        path = _write_lines(tmp_path / f"{megabytes}.jsonl", megabytes)
        data: dict[str, Any] = {"source": [str(path)], "processes": 2}
        if tokenizer == "the job's":
            data["tokenizer"] = str(tmp_path / "tokenizer.json")
            train_tokenizer([prose(1, 4000)], 300).save(data["tokenizer"])
        job = make_job(tmp_path / "cache", data)
        (tmp_path / "job.yaml").write_text(dump_job(job))
        command = [sys.executable, "-c", _LIMITED, "", str(tmp_path / "job.yaml")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 100e6, peaks
