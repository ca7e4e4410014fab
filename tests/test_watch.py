"""`copus watch` and `copus runs`: the state of a run is right, and a frame shows what a person looks for."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_events import DATA, TENSOR, decision, noise, reconfigure, start, step, trial, write_run, write_timed_run
from launch_jobs import copus_command, copus_here
from rich.console import Console
from told_run import HOSTILE, WIDE, evaluate, told_events, write_told_run

import launch.watched
from copus.events import End, Event, Failure, Profile, Reconfigure
from launch.engines.base import EngineState, Phase
from launch.follow import Follower
from launch.run_directory import lock_run
from launch.run_state import state_of
from launch.runs import status_of
from launch.status import RunStatus
from launch.watch_frame import frame, headline, sparkline
from launch.watched import Watched

NOW = 2_000_000.0
FAILED = Failure(step=1, samples_consumed=4, rank=1, message="killed")
MEASURED = Profile(step=0, samples_consumed=0, configuration=DATA, done=2, total=5, step_seconds=0.1)


def ended(reason: str) -> End:
    return End.model_validate({"step": 1, "samples_consumed": 4, "reason": reason, "seconds": 1.0})


@pytest.mark.parametrize(
    ("events", "silent", "held", "expected"),
    [
        ([], 0, False, "crashed"),
        ([], 0, True, "starting"),
        ([MEASURED], 5, True, "measuring"),
        ([start(), step(4)], 5, True, "running"),
        ([start(), step(4)], 5, False, "running"),  # on a machine whose lock is not seen here
        ([start(), step(4)], -3600, False, "crashed"),  # the clock was set back after it wrote that
        ([start(), step(4)], 500, True, "stalled"),
        ([start(), step(4, seconds=100.0)], 500, True, "running"),  # a step takes as long here
        ([start(), step(4)], 500, False, "crashed"),
        ([start(), step(4), FAILED], 5, False, "failed"),
        ([start(), step(4), FAILED], 5, True, "starting"),  # the agent does it again
        ([start(), step(4), FAILED, start(4), step(8)], 5, True, "running"),
        ([start(), step(4), ended("finished")], 5, False, "finished"),
        ([start(), step(4), ended("interrupted")], 500, False, "stopped"),
        ([start(), step(4), ended("max_minutes")], 5, True, "stopping"),
        ([start(), step(4), ended("interrupted")], 500, True, "starting"),  # a resume
    ],
)
def test_states(tmp_path: Path, events: list[Event], silent: float, held: bool, expected: str) -> None:
    run = write_timed_run(tmp_path, *((NOW - silent, event) for event in events))
    status = RunStatus()
    status.update(Follower(run).read())
    if held:
        with lock_run(run):
            state = state_of(run, status, NOW)
    else:
        (run / "lock").touch()
        state = state_of(run, status, NOW)
    assert state.name == expected
    assert state.alive == (expected in ("starting", "measuring", "running", "stalled", "stopping"))


@pytest.mark.parametrize(
    ("events", "phase", "expected"),
    [
        ([], "queued", "queued"),
        ([start(), step(4), ended("interrupted")], "queued", "queued"),  # requeued
        ([start(), step(4), ended("finished")], "queued", "finished"),
        ([], "running", "starting"),
        ([start(), step(4)], "running", "stalled"),
        ([start(), step(4)], "ended", "crashed"),
        ([start(), step(4)], "unknown", "unknown"),
        ([], "unknown", "unknown"),
        ([start(), step(4), FAILED], "unknown", "failed"),
    ],
)
def test_an_engine_with_a_queue_is_asked(tmp_path: Path, events: list[Event], phase: Phase, expected: str) -> None:
    run = write_timed_run(tmp_path, *((NOW - 500, event) for event in events))
    (run / "engine.json").touch()
    state = state_of(run, status_of(run), NOW, ask=lambda _: EngineState(phase, "job 7: Resources"))
    assert state.name == expected
    assert state.alive == (expected in ("queued", "starting", "stalled", "unknown"))
    if phase == expected:
        assert state.why == "job 7: Resources"


def test_a_scheduler_is_not_asked_at_every_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeued job keeps its end while it waits; a run without a scheduler is looked at each time."""
    run = write_timed_run(tmp_path, (NOW - 500, start()), (NOW - 500, ended("interrupted")))
    questions: list[Path] = []

    def asked(run: Path) -> EngineState:
        questions.append(run)
        return EngineState("queued", "job 7: Resources")

    monkeypatch.setattr(launch.watched, "engine_state", asked)
    for expected in (4, 1):
        watched = Watched(run)
        for _ in range(3):
            watched.update(Follower(run).read())
        assert watched.state.name == "queued"
        assert len(questions) == expected
        questions.clear()
        (run / "engine.json").touch()
    monkeypatch.setattr(launch.watched, "ASK_SECONDS", 0)
    watched = Watched(run)
    monkeypatch.setattr(launch.watched, "engine_state", lambda run: EngineState("unknown", "no answer"))
    watched.update([])
    assert watched.state.name == "queued"  # as it said last


def test_looking_does_not_hold_the_lock(tmp_path: Path) -> None:
    run = write_run(tmp_path, start())
    (run / "lock").touch()
    state_of(run, RunStatus())
    with lock_run(run):
        pass


def test_a_stop_that_was_asked_for_is_seen(tmp_path: Path) -> None:
    run = write_timed_run(tmp_path, (NOW - 1, start()), (NOW, step(4)))
    (run / "stop").touch()
    assert state_of(run, status_of(run), NOW).why == "at the next step, with a checkpoint"


def test_the_status_of_a_list_is_that_of_all_events(tmp_path: Path) -> None:
    run = write_told_run(tmp_path)
    whole, quick = RunStatus(), status_of(run)
    whole.update(Follower(run).read())
    for name in (
        "start",
        "step",
        "noise",
        "evaluation",
        "configuration",
        "moves",
        "end",
        "failure",
        "samples_consumed",
    ):
        assert getattr(whole, name) == getattr(quick, name), name
    assert len(quick.moves) == 2


def test_eighty_columns_show_the_batch_of_every_alternative_and_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    back = reconfigure(0, 4, DATA, TENSOR).model_copy(update={"trial": True})
    there = reconfigure(0, 4, TENSOR, DATA).model_copy(update={"trial": True})
    run = write_run(
        tmp_path, start(), step(4), decision(0, 4, TENSOR, DATA), there, back, trial(0, 4, "returned"), step(8)
    )
    assert copus_here("watch", str(run), "--once") == 0
    text = capsys.readouterr().out
    for configuration in (TENSOR, DATA):
        assert re.search(rf"^{configuration.label}  █+ ", text, re.MULTILINE)
    assert "none, 1 trial in 3 s" in text
    assert "tried TP1·PP1·DP2 B8 m2 for 6 steps" in text
    assert "trial: now" not in text


def test_moves_that_a_restart_undid_do_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path, start(), step(4), reconfigure(0, 4, TENSOR, DATA), step(12), start(0))
    assert status_of(run).moves == []
    assert status_of(run).configuration == TENSOR


def shown(watched: Watched, width: int = 130) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(frame(watched, width))
    return captured.get()


def test_a_frame_shows_what_a_person_looks_for(tmp_path: Path) -> None:
    run = write_told_run(tmp_path / "runs" / "told")
    watched = Watched(run)
    watched.update(Follower(run).read())
    text = shown(watched)
    expected = [
        "stopped: reached max_minutes",
        "11.4 k of 12.8 k tokens",
        "validation 4.500 (at first 8.200)",
        "12 (9–20)",
        "16",
        "TP1·PP1·DP2",
        "80 (160 predicted)",
        "2 in 2.5 s",
        "running",
        "warning: look at </script>",
        "▁",
        "█",
    ]
    assert [part for part in expected if part not in text] == []
    assert max(map(len, text.splitlines())) <= 130
    assert max(map(len, shown(watched, 60).splitlines())) <= 60


def test_a_frame_shows_the_utilization_of_what_is_rated(tmp_path: Path) -> None:
    run = write_told_run(tmp_path / "runs" / "told")
    watched = Watched(run)
    watched.update(Follower(run).read())
    assert "MFU" not in shown(watched)
    assert watched.status.start is not None
    watched.status.start = watched.status.start.model_copy(update={"peak_samples_per_second": 200.0})
    assert "80 (160 predicted), MFU 40 %" in shown(watched)


def test_the_curve_forgets_what_was_trained_again_and_predictions_follow_moves(tmp_path: Path) -> None:
    events = told_events()
    run = write_timed_run(tmp_path, *events)
    watched = Watched(run)
    watched.update(Follower(run).read())
    assert len(watched.losses) == 15 + 10 + 3 + 12
    assert watched.predicted == 160.0
    shown_scores = [each.goodput for each in watched.alternatives()]
    assert shown_scores == sorted(shown_scores, key=lambda score: -(score or 0))
    assert WIDE in [each.configuration for each in watched.alternatives()]
    first = next(place for place, (_, event) in enumerate(events) if isinstance(event, Reconfigure))
    early = Watched(run)
    early.update(Follower(run).read()[:first])
    assert early.predicted == pytest.approx(4 / 0.08)  # as the profiler measured it


def test_a_sparkline_has_the_shape_of_its_values() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([3.0], 10) == "▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([8.0, 8.0, 1.0, 1.0], 2) == "█▁"


def test_a_frame_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new")
    assert "crashed: its workers never began" in shown(Watched(run))
    with lock_run(run):
        watched = Watched(run)
        watched.update([MEASURED.model_copy(update={"time": time.time()})])
        assert "measuring 2/5" in shown(watched)
        assert headline(watched).endswith("measuring (the throughput of this machine)")


def test_watch_ends_with_the_run_and_tells_each_change_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", start(), evaluate(0, 8.0), step(4))
    with lock_run(run):
        command = copus_command("watch", str(run))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]  # training, evaluated, running
        write_run(run, reconfigure(0, 4, TENSOR, DATA), step(12), ended("finished"))
    rest = process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == 0
    assert "running" in lines[-1]
    text = [*lines, *rest]
    assert [sum(part in line for line in text) for part in ("validation loss 8.000", "moved TP2")] == [1, 1]
    assert "finished, 128 tokens" in rest[-1]


def test_json_is_a_stream_of_changes_and_an_error_is_an_object_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "one", start(), step(4), ended("finished"))
    assert copus_here("watch", str(run), "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(values["schema_version"], values["state"]) for values in map(json.loads, lines)] == [(1, "finished")]
    assert copus_here("watch", str(tmp_path / "two"), "--json") == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"schema_version": 1, "error": printed.err.strip().removeprefix("copus: ")}


def test_ctrl_c_leaves_a_watch_and_says_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", start(), step(4))
    terminal, other = pty.openpty()
    with lock_run(run):
        process = subprocess.Popen(
            copus_command("watch", str(run)),
            stdin=other,
            stdout=other,
            stderr=subprocess.PIPE,
            env={**os.environ, "TERM": "xterm"},
            # A shell starts what runs in its background with Ctrl-C ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(other)
        seen = b""
        while b"running" not in seen:
            seen += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how the end of a terminal is told
            while os.read(terminal, 4096):  # who does not read it on lets the last frame wait for room
                pass
        assert process.wait(timeout=30) == 130
    assert process.stderr is not None
    assert process.stderr.read() == b""
    os.close(terminal)


def test_once_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_told_run(tmp_path / "told")
    assert copus_here("watch", str(run), "--once") == 0
    assert "stopped" in capsys.readouterr().out
    assert copus_here("watch", str(run), "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["state"], values["moves"], values["label"]) == ("stopped", 2, WIDE.label)
    assert values["noise"] == {"value": 12.0, "low": 9.0, "high": 20.0}


def test_runs_are_listed_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    write_timed_run(tmp_path / "runs" / "old", (now - 9000, start()), (now - 9000, step(4)), (now - 9000, FAILED))
    write_timed_run(tmp_path / "runs" / "new", (now - 1, start()), (now, step(4)), (now, noise(4)))
    (tmp_path / "runs" / "no run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert copus_here("runs") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[2][:8] == ["new", "running", "1", "%", "128", "3.000", "–", "4"]
    assert lines[3][:2] == ["old", "failed"]
    assert " ".join(lines[4]) == "old failed: rank 1: killed"
    assert copus_here("runs", "runs", "--json") == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [(Path(each["run"]).name, each["state"]) for each in found] == [("new", "running"), ("old", "failed")]


@pytest.mark.parametrize(("folder", "code"), [("nowhere", 2), ("empty", 0)])
def test_a_folder_without_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str, code: int
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert copus_here("runs", folder) == code
    assert f"no runs in {folder}: " in "".join(capsys.readouterr())


def test_hostile_text_does_not_reach_the_terminal_as_markup(tmp_path: Path) -> None:
    failure = Failure(step=0, samples_consumed=0, rank=0, message=f"[red]{HOSTILE}[/nonsense]")
    run = write_run(tmp_path, start(), failure)
    watched = Watched(run)
    watched.update(Follower(run).read())
    assert "[red]</script>" in shown(watched)
