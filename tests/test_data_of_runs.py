"""A run goes by the data that it began with: text changed, moved or gone, a tokenizer replaced, data damaged."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from data_text import prose
from launch_events import SEQ_LEN, start, step, write_run
from launch_jobs import copus_here, prepare_fake, write_job
from test_end_to_end import _write_job as write_end_to_end_job
from tokenizers import Tokenizer
from told_run import evaluate

from copus.checkpoints.files import FOLDER, check_same_data
from copus.data.tokenizer import train_tokenizer
from copus.events import Branch, Checkpoint, Start, read_events
from copus.job import load_job
from copus.manifest import describe, files_of, write_manifest
from launch.history import read_history
from launch.report.comparison import comparison

Change = Callable[[Path], object]
LONGER = ("--set", "training.tokens=25600")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that has trained, on a user's tokenizer; its prepared data is not real."""
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer([prose(1)], 290).save(str(tokenizer))
    write_job(tmp_path, data={"tokenizer": str(tokenizer)})
    monkeypatch.chdir(tmp_path)
    assert copus_here("submit", "job.yaml", worker=["--steps", "3"]) == 0
    return tmp_path


def resume(*arguments: str) -> int:
    return copus_here("submit", "--resume", "small", *arguments, *LONGER, worker=["--steps", "6"])


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line with which a resume is refused; nothing was trained, and the run's job is as it was."""
    run = Path("runs/small")
    before = (run / "job.yaml").read_text(), (run / "events.jsonl").read_text()
    capfd.readouterr()
    assert resume(*arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    lines = [line for line in errors.splitlines() if line.startswith("copus: ")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    assert ((run / "job.yaml").read_text(), (run / "events.jsonl").read_text()) == before
    return lines[0]


def digest_of(folder: Path, run: str = "small") -> str:
    job = load_job(folder / "runs" / run / "job.yaml")
    assert job.data.prepared
    return job.data.prepared


def replace_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["another"])
    tokenizer.save(str(folder / "tokenizer.json"))


CHANGES: dict[str, Change] = {
    "text changed in place": lambda folder: (folder / "one.txt").write_text("another text " * 300),
    "a line appended": lambda folder: (folder / "one.txt").open("a").write("and a line\n"),
    "text gone": lambda folder: (folder / "one.txt").unlink(),
    "tokenizer replaced": replace_tokenizer,
    "tokenizer gone": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer damaged": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "notes of what inputs gave are gone": lambda folder: shutil.rmtree(folder / "cache/data/inputs"),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@changes
def test_a_resume_goes_on_with_the_data_of_the_run_whatever_became_of_the_text(change: Change, folder: Path) -> None:
    digest = digest_of(folder)
    change(folder)
    assert resume() == 0
    assert digest_of(folder) == digest
    assert [path.name for path in (folder / "cache/data").iterdir() if path.name != "inputs"] == [digest]
    assert len([event for event in read_events(folder / "runs/small") if isinstance(event, Start)]) == 2


def test_a_resume_with_the_old_job_file_keeps_the_data_of_the_run(folder: Path) -> None:
    """`submit job.yaml --resume RUN`: that file names no data, and its text is another one by now."""
    digest = digest_of(folder)
    (folder / "one.txt").write_text("another text " * 300)
    assert copus_here("submit", "job.yaml", "--resume", "small", *LONGER, worker=["--steps", "6"]) == 0
    assert digest_of(folder) == digest


@pytest.mark.parametrize("change", ["text", "tokenizer"])
def test_data_that_cannot_be_made_again_as_it_was_is_refused(
    change: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The prepared folder is gone: what the text gives now is something else."""
    digest = digest_of(folder)
    shutil.rmtree(folder / "cache/data" / digest)
    line = refused(capfd)
    assert f"data.prepared({digest}) is not in {folder}/cache/data any more" in line
    assert "now give other data" in line
    CHANGES[f"{change} gone"](folder)
    line = refused(capfd)
    assert f"data.prepared({digest}) is not in {folder}/cache/data any more, and it cannot be made again: data" in line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.prepared=0123456789abcdef", "data.prepared is {digest} in this run and cannot become 0123456789abcdef"),
        ("data.source=[two.txt, three.txt]", "data.source is "),
        ("data.held_out=[one]", "data.held_out is ['two'] in this run and cannot become ['one']"),
        ("data.tokenizer=null", "data.tokenizer is "),
    ],
)
def test_a_resume_with_other_data_is_refused(
    setting: str, words: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "three.txt").write_text(prose(3))
    assert words.format(digest=digest_of(folder)) in refused(capfd, "--set", setting)


def test_the_data_of_a_run_is_its_own_whatever_is_set(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert copus_here("data", "small", "--set", "data.source=[two.txt]") == 2
    assert (
        f"data.source is ['{folder}/one.txt', '{folder}/two.txt'] in this run and cannot become ['{folder}/two.txt']"
        in capfd.readouterr().err
    )
    CHANGES["text changed in place"](folder)
    assert copus_here("data", "small") == 0
    assert capfd.readouterr().out == f"{folder}/cache/data/{digest_of(folder)}\n"


def test_a_copied_job_file_whose_text_and_digest_disagree_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`cp runs/small/job.yaml other.yaml`, and another text in it: the digest of the run's data is there too."""
    digest = digest_of(folder)
    values = yaml.safe_load((folder / "runs/small/job.yaml").read_text()) | {"name": "other"}
    (folder / "same.yaml").write_text(yaml.safe_dump(values))
    (folder / "three.txt").write_text(prose(3))
    values["data"]["source"] = [str(folder / "two.txt"), str(folder / "three.txt")]
    (folder / "other.yaml").write_text(yaml.safe_dump(values))
    assert copus_here("submit", "same.yaml", worker=["--steps", "3"]) == 0
    for command in ("submit", "data"):
        assert copus_here(command, "other.yaml") == 2
        said = f"data.prepared({digest}) is not what the fields beside it give now, which is not prepared: take it out"
        assert said in capfd.readouterr().err
    assert copus_here("submit", "other.yaml", "--set", f"data.prepared={digest}", worker=["--steps", "3"]) == 0
    CHANGES["text gone"](folder)
    assert copus_here("submit", "same.yaml", worker=["--steps", "3"]) == 0


def test_a_resume_may_name_the_place_that_the_same_text_was_moved_to(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "moved").mkdir()
    for name in ("one.txt", "two.txt"):
        (folder / name).rename(folder / "moved" / name)
    moved = f"data.source=[{folder}/moved/one.txt, {folder}/moved/two.txt]"
    assert resume("--set", moved) == 0
    job = load_job(folder / "runs/small/job.yaml")
    assert isinstance(job.data.source, list)
    assert job.data.source[0].parent == folder / "moved"
    (folder / "moved/one.txt").write_text("another text " * 300)
    assert refused(capfd, "--set", "data.source=[moved/two.txt, moved/one.txt]").endswith("this is not prepared")


def test_prepared_data_may_move_to_another_cache(folder: Path) -> None:
    (folder / "one.txt").unlink()
    (folder / "cache").rename(folder / "elsewhere")
    assert resume("--set", "data.cache=elsewhere") == 0


def test_a_checkpoint_of_other_data_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As when somebody copies one from another run."""
    checkpoint = folder / "runs/small" / FOLDER / "samples-000000000012"
    checkpoint.mkdir(exist_ok=True)
    values = {"state": {"samples_consumed": 12, "data": "0123456789abcdef"}}
    (checkpoint / "trainer.json").write_text(json.dumps(values))
    line = refused(capfd)
    assert f"{checkpoint.name} was trained on the data 0123456789abcdef, and this job has the data" in line
    for text in ("{", "[]", '{"state": 3}', json.dumps({"state": {"samples_consumed": 12}})):  # an older one's too
        (checkpoint / "trainer.json").write_text(text)
        check_same_data(checkpoint, digest_of(folder))


def test_a_run_of_an_older_version_is_given_the_data_that_its_settings_name(folder: Path) -> None:
    """It did not write which data it was trained on."""
    digest = digest_of(folder)
    path = folder / "runs/small/job.yaml"
    values = yaml.safe_load(path.read_text())
    del values["data"]["prepared"]
    path.write_text(yaml.safe_dump(values))
    assert resume() == 0
    assert digest_of(folder) == digest


def _zero_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


DAMAGES: dict[str, tuple[Change, str]] = {
    "half of it zeroed": (lambda data: _zero_half(data / "train.bin"), "train.bin has changed since it was written"),
    "cut": (lambda data: (data / "train.bin").write_bytes(b"1"), "train.bin has 1 bytes instead of"),
    "a file gone": (lambda data: (data / "valid.idx").unlink(), "valid.idx cannot be read: No such file"),
    "tokenizer replaced": (lambda data: _zero_half(data / "tokenizer.json"), "tokenizer.json has changed since"),
    "no manifest": (lambda data: (data / "manifest.json").unlink(), "manifest.json cannot be read: No such file"),
    "an old manifest": (lambda data: (data / "manifest.json").write_text("{}"), "was not written by this version"),
}
damages = pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)


@damages
def test_damaged_data_is_found_before_a_run_starts_or_goes_on(
    damage: Change, words: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepared = folder / "cache/data" / digest_of(folder)
    damage(prepared)
    line = refused(capfd)
    assert words in line
    assert line.endswith("remove the folder, and it is made again from data.source")
    assert copus_here("submit", "job.yaml", worker=["--steps", "1"]) == 2
    assert words in capfd.readouterr().err
    assert not (folder / "runs/small-2").exists()


@damages
def test_verify_finds_damage_of_the_data_of_a_job_and_of_a_run(
    damage: Change, words: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepared = folder / "cache/data" / digest_of(folder)
    for target in ("job.yaml", "small", "runs/small"):
        capfd.readouterr()
        assert copus_here("data", target, "--verify") == 0
        assert capfd.readouterr().out == f"{prepared}: every file is as it was prepared\n"
    damage(prepared)
    for target in ("job.yaml", "small"):
        assert copus_here("data", target, "--verify") == 2
        output, errors = capfd.readouterr()
        assert output == ""
        assert [words in line for line in errors.splitlines() if line.startswith("copus: ")] == [True], errors


def test_there_is_nothing_to_verify_before_data_is_prepared(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert copus_here("data", "job.yaml", "--verify", "--set", "model.vocab=300") == 2
    errors = capfd.readouterr().err
    assert errors == (f"copus: data: the prepared data is not in {folder}/cache/data: run `copus data` with this job\n")
    assert copus_here("data", "nothing", "--verify") == 2
    assert "no run nothing" in capfd.readouterr().err


def write_tiny_job(folder: Path) -> Path:
    """A job of one rank that is long enough to be killed, and writes a checkpoint early."""
    path = write_end_to_end_job(folder)
    values = yaml.safe_load(path.read_text())
    values["cluster"] = {"accelerators_per_node": 1}
    values["training"] |= {"layout": {}, "tokens": 16 * 4 * 600, "checkpoint_every_tokens": 16 * 4 * 50}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.dist
def test_a_crash_after_the_text_has_changed_is_restarted_with_the_data_of_the_run(tmp_path: Path) -> None:
    """All of it real: a line is appended and the other text removed while the job trains, then its worker is killed."""
    job = write_tiny_job(tmp_path)
    run = tmp_path / "runs/tiny"
    command = [sys.executable, "-m", "launch.cli", "submit", str(job)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as submit:
        deadline = time.monotonic() + 300
        while not any(isinstance(event, Checkpoint) for event in read_events(run)):
            assert submit.poll() is None, submit.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (tmp_path / "one.txt").open("a").write("and a line more\n")
        (tmp_path / "two.txt").unlink()
        [worker] = [
            process
            for process in psutil.Process(submit.pid).children(recursive=True)
            if "copus.worker" in " ".join(process.cmdline()) and not process.children()
        ]
        worker.kill()
        output, _ = submit.communicate(timeout=300)
    assert submit.returncode == 0, output
    starts = [event for event in read_events(run) if isinstance(event, Start)]
    assert len(starts) == 2
    assert starts[0].data == starts[1].data == digest_of(tmp_path, "tiny")
    newest = max((run / FOLDER).glob("samples-*"))
    assert json.loads((newest / "trainer.json").read_text())["state"]["data"] == starts[0].data


# calibrate


@pytest.fixture
def calibrated(folder: Path) -> Path:
    """A calibration of a run's only checkpoint."""
    run = folder / "runs/small"
    _checkpoint(run, digest_of(folder), tokens=1)
    assert copus_here("calibrate", "small", "--orders", "1", worker=[]) == 0
    return run


def _checkpoint(run: Path, data: str, tokens: int) -> Path:
    checkpoint = run / FOLDER / "samples-000000000012"
    checkpoint.mkdir(exist_ok=True)
    configuration = load_job(run / "job.yaml").training.configuration.model_dump(mode="json")
    values = {"state": {"samples_consumed": 12, "data": data, "decisions": tokens}, "configuration": configuration}
    (checkpoint / "trainer.json").write_text(json.dumps(values))
    write_manifest(checkpoint, describe(checkpoint, files_of(checkpoint)))
    return checkpoint


def _branches(run: Path) -> int:
    [log] = run.glob("calibration/*/events.jsonl")
    return sum(isinstance(event, Branch) for event in read_events(log.parent))


@changes
def test_a_calibration_goes_by_the_data_of_the_run(change: Change, calibrated: Path, folder: Path) -> None:
    [log] = calibrated.glob("calibration/*/events.jsonl")
    first_order = log.read_bytes()
    change(folder)
    assert copus_here("calibrate", "small", "--orders", "2", worker=[]) == 0
    assert log.read_bytes().startswith(first_order), "those of the first order were not run again"
    assert _branches(calibrated) == 8
    [job] = calibrated.glob("calibration/*/job.yaml")
    assert load_job(job).data.prepared == digest_of(folder)


def test_branches_of_another_checkpoint_of_the_same_name_do_not_count(calibrated: Path, folder: Path) -> None:
    """As after a run was trained anew from its beginning."""
    _checkpoint(calibrated, digest_of(folder), tokens=2)
    assert copus_here("calibrate", "small", "--orders", "2", worker=["--fail-at", "3"]) == 1
    assert _branches(calibrated) == 3, "it began from nothing"


def test_a_checkpoint_of_other_data_is_not_calibrated(
    calibrated: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _checkpoint(calibrated, "0123456789abcdef", tokens=1)
    capfd.readouterr()
    assert copus_here("calibrate", "small", worker=[]) == 2
    assert "was trained on the data 0123456789abcdef, and this job has the data" in capfd.readouterr().err


# report


def _told(run: Path, data: str | None, faster: float = 1.0) -> Path:
    events = [start().model_copy(update={"data": data}), evaluate(0, 8.0)]
    for samples in range(4, 44, 4):
        events += [step(samples), evaluate(samples, 8.0 - faster * samples / 20)]
    return write_run(run, *events)


def _compare(*runs: Path) -> tuple[object, str, list[str]]:
    content = comparison([read_history(run) for run in runs])
    return content.values["equal"], content.reasons["equal"], content.summary


def test_runs_on_other_texts_have_no_time_to_equal_loss(tmp_path: Path) -> None:
    assert SEQ_LEN > 1
    one, two = "1" * 16, "2" * 16
    first = _told(tmp_path / "first", one)
    equal, _, summary = _compare(first, _told(tmp_path / "second", one, faster=2.0))
    assert equal is not None
    assert summary[0].startswith("A validation loss of ")

    other = _told(tmp_path / "other", two, faster=2.0)
    equal, why, summary = _compare(first, other)
    assert equal is None
    assert why.startswith("The losses cannot be compared: the texts or the tokenizers of these runs differ.")
    assert f"Their data is {one} in first, {two} in other" in why
    assert summary == [why]

    older = _told(tmp_path / "older", None)
    assert _compare(first, older)[0] is not None, "settings that are the same, where one run does not say"
    assert _compare(first, older, other)[1] == why


def test_the_same_data_from_another_place_is_compared(tmp_path: Path) -> None:
    """What the jobs call the text says nothing; what they call it is all there is to go by in older runs."""
    runs = []
    for name, data in (("first", "1" * 16), ("second", "1" * 16), ("third", None), ("fourth", None)):
        run = _told(tmp_path / name, data)
        (run / "job.yaml").write_text(yaml.safe_dump({"data": {"source": [f"/{name}/text"]}, "model": {"seq_len": 32}}))
        runs.append(run)
    assert _compare(*runs[:2])[0] is not None
    equal, why, _ = _compare(*runs[2:])
    assert equal is None
    assert "data.source is not the same" in why


def test_a_run_that_is_submitted_again_with_other_text_has_other_data(folder: Path) -> None:
    (folder / "one.txt").write_text("another text " * 300)
    prepare_fake(load_job(folder / "job.yaml"))
    assert copus_here("submit", "job.yaml", worker=["--steps", "3"]) == 0
    second = load_job(folder / "runs/small-2/job.yaml").data.prepared
    assert second not in (None, digest_of(folder))
