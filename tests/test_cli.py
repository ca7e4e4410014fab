"""The `copus` command itself: it answers at once, imports nothing heavy, and ends as the shell expects."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from launch_events import DATA, TENSOR, decision, reconfigure, start, step, write_run
from launch_jobs import copus_here, copus_process

from copus.events import Failure
from launch.cli import _warn, copus

HEAVY = ("torch", "megatron", "numpy", "matplotlib", "plotly", "jinja2", "tokenizers", "tensorboard", "duckdb")
COMMANDS = (
    "submit",
    "logs",
    "cancel",
    "data",
    "profile",
    "profile run",
    "profile show",
    "profile import",
    "plan",
    "import-args",
    "advise",
    "watch",
    "runs",
    "explain",
    "audit",
    "report",
    "plot",
    "export",
    "import-hf",
    "calibrate",
    "simulate",
)


def imported(folder: Path, *arguments: str) -> set[str]:
    """Top-level modules in memory when the command has ended."""
    script = (
        "import sys\nfrom launch.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print({name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return set(eval(result.stderr))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "runs" / "one", start(), decision(0, 4, TENSOR, DATA), reconfigure(0, 4, TENSOR, DATA), step(12)
    )


def test_help_and_explain_import_nothing_heavy(run: Path) -> None:
    helped = imported(run.parent.parent, "--help")
    explained = imported(run.parent.parent, "explain", "one", "--json")
    assert "click" in helped
    assert "planner" in explained
    assert (helped | explained).isdisjoint(HEAVY)
    assert "pydantic" not in helped


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    assert f"copus {command}" in text.partition("Example")[2]
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_is_explained_in_sentences(name: str) -> None:
    command: click.Command = copus
    for word in name.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    for parameter in command.params:
        explanation = getattr(parameter, "help", None) or ""
        assert re.fullmatch(r"[A-Z$].*\.", explanation, re.DOTALL), (parameter.name, explanation)


def test_the_command_alone_prints_the_help_and_its_version_is_that_of_the_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert copus_here() == 0
    assert "Usage: copus" in capsys.readouterr().out
    assert copus_here("--version") == 0
    assert capsys.readouterr().out == f"copus {version('copus')}\n"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("explian", "copus: no such command 'explian'; did you mean explain or plan?\n"),
        ("zzz", "copus: no such command 'zzz' (see copus --help)\n"),
        ("explain --decison 3", "copus: no such option '--decison'; did you mean --decision or --json?\n"),
        ("explain --decision", "copus: option '--decision' requires an argument\n"),
    ],
)
def test_a_misspelt_command_or_option_is_answered_with_the_nearest(
    typed: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copus_here(*typed.split()) == 2
    assert capsys.readouterr().err == message


def test_a_misspelt_run_is_answered_with_the_nearest(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent.parent)
    assert copus_here("explain", "oen") == 2
    assert capsys.readouterr().err.endswith("is a folder with a job.yaml; did you mean one?\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ex"], ["explain", "export"]),
        (["explain", ""], ["one", "other"]),
        (["submit", "--resume", "ot"], ["other"]),
        (["export", "--to", "m"], ["megatron"]),
        (["explain", "--dec"], ["--decision"]),
    ],
)
def test_the_shell_completes_commands_options_and_the_names_of_runs(
    words: list[str],
    expected: list[str],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run.parent / "other").mkdir()
    (run.parent / "other" / "job.yaml").write_text("")
    monkeypatch.chdir(run.parent.parent)
    monkeypatch.setenv("_COPUS_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(["copus", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    assert copus_here() == 0
    assert capsys.readouterr().out.split() == [f"plain,{word}" for word in expected]


def test_the_newest_run_is_meant_if_none_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "older", start())
    os.utime(tmp_path / "runs" / "older" / "events.jsonl", (1, 1))
    os.utime(tmp_path / "runs" / "older" / "job.yaml", (1, 1))
    monkeypatch.chdir(tmp_path)
    assert copus_here("explain", "--json") == 0
    output, errors = capsys.readouterr()
    assert json.loads(output)["run"] == str(run)
    assert errors == "copus: runs/one, the newest run\n"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert copus_here("audit") == 2
    assert capsys.readouterr().err.startswith("copus: no run in runs: name one")
    monkeypatch.setenv("COPUS_RUNS", str(tmp_path / "runs"))
    assert copus_here("explain", "one", "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(run)


def test_a_watch_of_a_run_that_failed_does_not_end_well(tmp_path: Path) -> None:
    failure = Failure(step=1, samples_consumed=4, rank=1, message="lost", fatal=True)
    failed = write_run(tmp_path / "failed", start(), step(4), failure)
    assert copus_here("watch", str(failed), "--once") == 1


@pytest.mark.parametrize("arguments", [["submit", "--frobnicate"], ["cancel"], ["explain", "a", "--decision", "x"]])
def test_what_cannot_be_parsed_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here(*arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert "Traceback" not in errors


def test_a_reader_that_leaves_is_no_error_message(run: Path) -> None:
    others = [DATA.model_copy(update={"global_batch": 4 * place}) for place in range(3, 800)]
    write_run(run, decision(1, 4, TENSOR, DATA, others))
    command = f"({sys.executable} -m launch.cli explain one --all --decision 1; echo $? >&2) | head -1"
    result = subprocess.run(command, shell=True, cwd=run.parent.parent, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("runs/one: decision 1")
    assert result.stderr == "1\n"  # it did not get everything out, and says only that


def test_modules_are_found_where_the_command_is_not_where_it_is_typed(tmp_path: Path) -> None:
    """A user's folder may have a `profiles` of its own; what the command starts must not import that one."""
    (tmp_path / "profiles.py").write_text("raise SystemExit('the wrong profiles')")
    script = (
        "from launch.process import *; from launch.interrupts import Interrupts; import sys\n"
        "sys.exit(run_module(python_module('profiles.layout'), Interrupts()))"
    )
    command = [sys.executable, "-P", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_with_json_an_error_of_the_command_line_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here("explain", "--json", "--decision", "x") == 2
    output, errors = capsys.readouterr()
    values = json.loads(output)
    assert values["schema_version"] == 1
    assert values["error"] == "invalid value for '--decision': 'x' is not a valid integer (see copus explain --help)"
    assert errors == f"copus: {values['error']}\n"


def test_a_warning_is_one_line_and_tells_a_terminal_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A throughput table may come from somebody else, and the names in it are in the warning about its lines."""
    _warn("line 3: \x1b[2J: unknown\nkey", UserWarning)
    assert capsys.readouterr().err == "copus: warning: line 3: �[2J: unknown key\n"


def test_json_is_one_object_on_stdout(run: Path) -> None:
    result = copus_process("explain", "one", "--json", cwd=run.parent.parent)
    assert json.loads(result.stdout)["decision"]["number"] == 0
    assert result.stderr == ""
