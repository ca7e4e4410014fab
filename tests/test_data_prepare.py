import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_text import make_job, prose, take_as_verified, write_in_the_past, write_works
from tokenizers import Tokenizer

import copus.data.encoding as encoding_module
import copus.data.prepare as prepare_module
from copus.data.manifest import FILES, read_manifest
from copus.data.prepare import prepare, verify
from copus.data.prepared import check_data, find_prepared, input_key, needs_verifying, prepared_path
from copus.data.tokenizer import train_tokenizer
from copus.job import JobConfig, JobError, dump_job


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_works(tmp_path / "text", **{f"work{seed}": prose(seed) for seed in range(8)})


@pytest.fixture
def job(tmp_path, corpus) -> JobConfig:
    return make_job(tmp_path / "cache", {"source": [str(corpus)], "held_out": ["work3", "work[56]"]})


def _text(folder: Path, side: str) -> list[str]:
    """The documents of a side, read back from the bytes of the data file."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.fromfile(folder / f"{side}.bin", dtype=np.uint16)
    ends = np.flatnonzero(ids == read_manifest(folder).eod)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(document[:-1].tolist()) for document in np.split(ids, ends[:-1] + 1)]


def test_every_work_is_whole_and_on_its_side(job):
    stages = []
    folder = prepare(job, lambda stage, done, total: stages.append((stage, done, total)))
    assert folder == prepared_path(job)
    assert {path.name for path in folder.iterdir()} == {*FILES, "manifest.json"}
    assert _text(folder, "train") == [prose(seed) for seed in (0, 1, 2, 4, 7)]
    assert _text(folder, "valid") == [prose(seed) for seed in (3, 5, 6)]
    assert stages[-1] == ("encoding, MiB", 1, 1)

    manifest = read_manifest(folder)
    assert {work.name: work.side for work in manifest.works if work.side == "valid"}.keys() == {
        "work3",
        "work5",
        "work6",
    }
    assert all(work.bytes == len(prose(int(work.name[4:]))) and work.documents == 1 for work in manifest.works)
    for side in ("train", "valid"):
        assert manifest.tokens(side) * 2 == (folder / f"{side}.bin").stat().st_size
        assert manifest.tokens(side) == sum(work.tokens for work in manifest.works if work.side == side)
    assert manifest.sources[0].sha256 == hashlib.sha256(prose(0).encode()).hexdigest()
    assert manifest.dropped == []


def test_tokenizer_sees_the_training_side_only(job, corpus):
    (corpus / "work3.txt").write_text("żółć ğüş " * 500 + prose(3))
    folder = prepare(job)
    expected = train_tokenizer([prose(seed) for seed in (0, 1, 2, 4, 7)], job.model.vocab)
    assert (folder / "tokenizer.json").read_text() == expected.to_str()


def test_same_job_gives_the_same_bytes_and_the_second_time_nothing_is_done(job, tmp_path, monkeypatch):
    first = prepare(job)
    elsewhere = make_job(tmp_path / "other", {"source": [str(tmp_path / "text")], "held_out": ["work[56]", "work3"]})
    second = prepare(elsewhere)
    assert first.name == second.name
    files = (*FILES, "manifest.json")
    assert [(first / name).read_bytes() for name in files] == [(second / name).read_bytes() for name in files]

    monkeypatch.setattr(prepare_module, "_build", None)
    assert prepare(job) == first


def test_the_digest_is_of_the_content_and_not_of_names(job, tmp_path):
    """The same documents from another file, with other names of works, are the same data."""
    first = prepare(job)
    order = [0, 1, 2, 4, 7, 3, 5, 6]
    for name, seeds in (("same", order), ("other", [1, 0, *order[2:]])):
        lines = [json.dumps({"text": prose(seed), "work": f"w{seed}"}) for seed in seeds]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = {"source": [str(tmp_path / "same.jsonl")], "held_out": ["w[356]"]}
    assert prepare(make_job(tmp_path / "cache", data)) == first
    data["source"] = [str(tmp_path / "other.jsonl")]
    assert prepare(make_job(tmp_path / "cache", data)) != first


def test_prepared_data_is_looked_up_by_everything_that_it_depends_on(job, tmp_path, corpus):
    data = {"source": [str(corpus)], "held_out": ["work3", "work[56]"]}
    same = make_job(tmp_path / "cache", data, seq_len=64, seed=7, global_batch=16)
    assert input_key(same) == input_key(job)

    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer([prose(1)], 300).save(str(tokenizer))
    others = [
        make_job(tmp_path / "cache", {**data, "held_out": ["work3"]}),
        make_job(tmp_path / "cache", data, vocab=301),
        make_job(tmp_path / "cache", {**data, "tokenizer": str(tokenizer)}),
        make_job(tmp_path / "cache", {**data, "source": [str(corpus / f"work{seed}.txt") for seed in range(7)]}),
        make_job(tmp_path / "cache", {"source": "shakespeare"}),
    ]
    before = input_key(job)
    (corpus / "work0.txt").write_text(prose(0) + "more\n")
    keys = {before, input_key(job), *map(input_key, others)}
    assert len(keys) == len(others) + 2


def test_leaks_are_dropped_from_training_and_recorded(job, corpus):
    lines = prose(3).splitlines()
    (corpus / "copy.txt").write_text(prose(3).upper())
    (corpus / "half.txt").write_text("\n".join(lines[: len(lines) // 2]) + "\n" + prose(50))
    (corpus / "collected.txt").write_text("".join(prose(seed) for seed in range(60, 80)) + prose(5))
    (corpus / "quotes.txt").write_text(lines[0] + "\n" + prose(51))
    folder = prepare(job)
    dropped = {record.document: record.reason for record in read_manifest(folder).dropped}
    assert dropped.keys() == {"copy.txt", "half.txt", "collected.txt"}
    assert dropped["copy.txt"] == "same text as held-out work3.txt"
    assert "held-out work5.txt" in dropped["collected.txt"]
    assert prose(51) in _text(folder, "train")[0]
    assert len(_text(folder, "train")) == 6
    assert {work.name: work.tokens for work in read_manifest(folder).works}["copy"] == 0


def test_all_of_training_held_out(job, corpus):
    for seed in (0, 1, 2, 4, 7):
        (corpus / f"work{seed}.txt").write_text(prose(3))
    with pytest.raises(JobError, match=r"data: all 5 training documents repeat held-out text; work0\.txt: same text"):
        prepare(job)
    assert find_prepared(job) is None


def test_a_file_that_is_held_out_whole_is_not_trained_on(corpus, tmp_path):
    file = str(corpus / "work0.txt")
    with pytest.raises(JobError, match=r"data: nothing is left to train on: all of data.source is held out"):
        prepare(make_job(tmp_path / "cache", {"source": [file], "held_out_source": [file]}))


def test_jsonl_works_stay_together(tmp_path):
    file = tmp_path / "corpus.jsonl"
    lines = [{"text": prose(seed), "work": f"w{seed % 3}"} for seed in range(9)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = prepare(make_job(tmp_path / "cache", {"source": [str(file)], "held_out": ["w1"]}))
    assert _text(folder, "valid") == [prose(seed) for seed in (1, 4, 7)]
    assert _text(folder, "train") == [prose(seed) for seed in (0, 2, 3, 5, 6, 8)]


def test_users_tokenizer_is_used(job, tmp_path, corpus):
    path = tmp_path / "mine.json"
    train_tokenizer([prose(99)], 290).save(str(path))
    with_tokenizer = make_job(tmp_path / "cache", {"source": [str(corpus)], "tokenizer": str(path)})
    folder = prepare(with_tokenizer)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() == Tokenizer.from_file(str(path)).get_vocab()
    assert sorted(_text(folder, "train") + _text(folder, "valid")) == sorted(prose(seed) for seed in range(8))


def test_failure_leaves_nothing(job, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(encoding_module, "encode", fail)
    with pytest.raises(JobError, match=r"data\.cache: cannot write /somewhere: No space left on device"):
        prepare(job)
    assert not job.data.cache.exists()
    assert find_prepared(job) is None


def test_two_at_once(job):
    """While one process encodes, another one prepares the same data from beginning to end."""
    other: list[Path] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "encoding, MiB" and not other:
            other.append(Path())
            other[0] = prepare(job)

    folder = prepare(job, progress)
    assert other == [folder]
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "inputs"}
    assert len(_text(folder, "train")) == 5


def _touch_nothing_but(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    assert path.stat().st_size == len(content), "a change that its size does not give away"
    path.write_bytes(content)


def test_half_of_the_tokens_zeroed_is_found_before_training(job):
    folder = prepare(job)
    take_as_verified(folder)
    assert prepare(job) == folder, "it was verified when it was made"
    content = (folder / "train.bin").read_bytes()
    half = len(content) // 2
    _touch_nothing_but(folder, "train.bin", content[:half] + bytes(len(content) - half))
    assert needs_verifying(folder)
    with pytest.raises(JobError, match=r"is damaged: train\.bin has changed since it was written .*remove the folder"):
        prepare(job)
    write_in_the_past(folder / "train.bin", content)
    assert prepare(job) == folder, "put back as it was"
    assert not needs_verifying(folder), "verified once"


def test_token_ids_outside_of_the_vocabulary_are_found_before_training(job):
    folder = prepare(job)
    ids = np.fromfile(folder / "valid.bin", dtype=np.uint16)
    ids[::50] = 60_000
    _touch_nothing_but(folder, "valid.bin", ids.tobytes())
    with pytest.raises(JobError, match=r"valid\.bin has changed since it was written"):
        prepare(job)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_missing_file_is_found_whenever_the_data_is_opened(job, name):
    folder = prepare(job)
    size = (folder / name).stat().st_size
    with open(folder / name, "r+b") as file:
        file.truncate(size - 1)
    for look in (check_data, prepare, lambda job: read_manifest(prepared_path(job))):
        with pytest.raises(JobError, match=f"is damaged: {name} has {size - 1} bytes instead of {size}; remove the f"):
            look(job)
    (folder / name).unlink()
    with pytest.raises(JobError, match=f"is damaged: {name} cannot be read: No such file or directory; remove the f"):
        check_data(job)


def test_a_manifest_of_other_data_is_not_believed(job, tmp_path, corpus):
    folder = prepare(job)
    other = prepare(make_job(tmp_path / "cache", {"source": [str(corpus)], "held_out": ["work1"]}))
    (folder / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    with pytest.raises(JobError, match=rf"is damaged: manifest\.json is that of other data \({other.name}\)"):
        check_data(job)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(JobError, match=r"manifest\.json was not written by this version; remove the folder"):
        check_data(job)


def test_a_copied_folder_is_verified_once_and_then_used_without_its_text(job, tmp_path, corpus):
    folder = prepare(job)
    shutil.rmtree(corpus)
    copy = tmp_path / "elsewhere" / "data" / folder.name
    shutil.copytree(folder, copy)
    write_in_the_past(copy / "train.bin", (copy / "train.bin").read_bytes())
    there = make_job(tmp_path / "elsewhere", {"source": str(corpus), "prepared": folder.name})
    assert needs_verifying(copy)
    assert prepare(there) == copy
    assert not needs_verifying(copy)
    with pytest.raises(JobError, match=r"was made for a vocabulary of 300, not model\.vocab\(301\)"):
        check_data(make_job(tmp_path / "elsewhere", {"source": str(corpus), "prepared": folder.name}, vocab=301))


def test_verifying_reads_every_byte_even_if_no_time_tells(job):
    folder = prepare(job)
    assert verify(folder).digest == folder.name
    ids = np.fromfile(folder / "train.bin", dtype=np.uint16)
    ids[7] ^= 1
    (folder / "train.bin").write_bytes(ids.tobytes())
    take_as_verified(folder)  # as if a disk had done it
    assert prepare(job) == folder
    with pytest.raises(JobError, match=r"train\.bin has changed"):
        verify(folder)


def test_the_largest_token_id_is_recorded(job):
    folder = prepare(job)
    ids = [int(np.fromfile(folder / f"{side}.bin", dtype=np.uint16).max()) for side in ("train", "valid")]
    assert read_manifest(folder).largest_id == max(ids) < job.model.vocab


def test_a_job_that_names_its_data_needs_no_text_and_heeds_no_change_of_it(job, corpus):
    folder = prepare(job)
    named = job.model_copy(update={"data": job.data.model_copy(update={"prepared": folder.name})})
    (corpus / "work0.txt").write_text(prose(77))
    assert prepared_path(named) == folder
    assert find_prepared(job) is None, "without the name it is other text"
    shutil.rmtree(corpus)
    check_data(named)
    assert prepare(named) == folder


def test_data_that_is_made_again_has_to_be_the_same(job, corpus):
    folder = prepare(job)
    named = job.model_copy(update={"data": job.data.model_copy(update={"prepared": folder.name})})
    before = (folder / "train.bin").read_bytes()
    shutil.rmtree(folder)
    assert prepare(named) == folder
    assert (folder / "train.bin").read_bytes() == before

    shutil.rmtree(folder)
    (corpus / "work0.txt").write_text(prose(77))
    with pytest.raises(JobError, match=rf"\({folder.name}\) is not in .* now give other data \([0-9a-f]+\)"):
        prepare(named)
    shutil.rmtree(corpus)
    with pytest.raises(JobError, match=rf"\({folder.name}\) .*cannot be made again: data\.source: no such"):
        check_data(named)


def test_text_that_changes_while_it_is_prepared_is_refused(job, corpus):
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "encoding, MiB" and done == 1:
            (corpus / "work0.txt").write_text(prose(0) + "and a line more\n")

    with pytest.raises(JobError, match=r"data\.source: the text changed while it was being prepared"):
        prepare(job, progress)
    assert find_prepared(job) is None


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe", b"../../elsewhere\n"])
def test_a_damaged_note_of_what_inputs_gave_is_no_more_than_work_done_again(job, content):
    folder = prepare(job)
    (folder.parent / "inputs" / input_key(job)).write_bytes(content)
    assert find_prepared(job) is None
    assert prepare(job) == folder
    assert find_prepared(job) == folder


def test_check_data_finds_it_before_anything_is_made(tmp_path, corpus):
    def check(data: dict, **more: int) -> None:
        check_data(make_job(tmp_path / "cache", data, **more))

    source = {"source": [str(corpus)]}
    check(source)
    check({"source": "shakespeare", "held_out": ["king_*", "sonnets"]})
    with pytest.raises(JobError, match=r"data\.source: no such file or folder: .*missing"):
        check({"source": str(tmp_path / "missing")})
    with pytest.raises(
        JobError, match=r"data\.held_out: 'hamlt' matches none of the 42 works; did you mean 'hamlet'\?"
    ):
        check({"source": "shakespeare", "held_out": ["hamlt"]})
    with pytest.raises(JobError, match=r"data\.held_out: \['\*'\] takes all 8 works"):
        check({**source, "held_out": ["*"]})
    check({"source": str(corpus / "work1.txt")})
    with pytest.raises(
        JobError, match=r"data\.held_out: 'work1' matches none of the 2 works; did you mean 'work1 \(end"
    ):
        check({"source": str(corpus / "work1.txt"), "held_out": ["work1"]})
    with pytest.raises(JobError, match=r"model\.vocab\(256\) is less than 256 bytes \+ 1 end-of-document token = 257"):
        check(source, vocab=256)
    with pytest.raises(JobError, match=r"data: .*gone\.json: No such file"):
        check({**source, "tokenizer": str(tmp_path / "gone.json")})
    assert not (tmp_path / "cache").exists()


def test_a_side_shorter_than_a_sequence(job, tmp_path, corpus):
    long = make_job(tmp_path / "cache", {"source": [str(corpus)], "held_out": ["work3"]}, seq_len=4096)
    with pytest.raises(JobError, match=r"data: the valid side has \d+ tokens < model\.seq_len\(4096\) \+ 1 = 4097"):
        prepare(long)
    assert find_prepared(long) is None
    prepare(make_job(tmp_path / "cache", {"source": [str(corpus)], "held_out": ["work3"]}))
    with pytest.raises(JobError, match="data: the valid side has"):
        check_data(long)


def test_command(job, tmp_path):
    def run(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "job.yaml").write_text(text)
        command = [sys.executable, "-m", "copus.data", str(tmp_path / "job.yaml")]
        return subprocess.run(command, capture_output=True, text=True)

    prepare(job)
    done = run(dump_job(job))
    assert (done.returncode, done.stdout) == (0, f"{prepared_path(job)}\n")
    failed = run(dump_job(job).replace("work3", "work33"))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("copus: data.held_out: 'work33' matches none of the 8 works")
    assert failed.stderr.count("\n") == 1


def test_looking_at_prepared_data_imports_nothing_heavy():
    heavy = {"torch", "megatron", "numpy", "tokenizers"}
    code = f"import sys, copus.data.prepared; print(*{heavy}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
