"""`copus submit` with a worker that only counts: progress, stopping, resuming, exit codes, and what is left behind."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from launch_jobs import copus_command, copus_here, write_job

import launch.submit
from copus.events import End, Start, Step, read_events
from copus.job import load_job
from launch.engines import LocalEngine
from launch.interrupts import Interrupts
from launch.process import module_environment, run_module
from launch.run_directory import create_run, lock_run

LONG = ["--steps", "100000"]


@dataclass(frozen=True)
class Result:
    """What the command did."""

    returncode: int
    stdout: str
    stderr: str


Copus = Callable[..., Result]


@pytest.fixture
def copus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Copus:
    """The command, in this process and in the test's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, worker: list[str] | None = None, how: str = "direct") -> Result:
        capfd.readouterr()
        code = copus_here(*arguments, worker=worker, how=how)
        return Result(code, *capfd.readouterr())

    return run


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    """Poll until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


@contextmanager
def submitted(folder: Path, *arguments: str, worker: list[str], how: str = "direct") -> Iterator[subprocess.Popen[str]]:
    """`copus submit …` while it runs; whatever is left of it is killed."""
    pipe = subprocess.PIPE
    command = copus_command("submit", *arguments, worker=worker, how=how)
    process = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        yield process
    finally:
        family = []
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        process.wait()
        for member in family:
            if member.is_running():
                member.kill()


def worker_is_gone(run: Path, rank: int = 0) -> bool:
    """Whether a worker that has started has ended."""
    pid = int((run / f"worker-{rank}.pid").read_text())
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def steps_seen(run: Path) -> int:
    return sum(isinstance(event, Step) for event in read_events(run))


def test_submit_trains_and_says_where_to_look(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    result = copus("submit", "job.yaml", "--set", "training.seed=7", worker=["--steps", "5"])
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "small"
    assert yaml.safe_load((run / "job.yaml").read_text())["training"]["seed"] == 7
    assert "finished" in result.stdout
    for command in ("copus explain runs/small", "tensorboard --logdir runs/small", "copus report runs/small"):
        assert command in result.stdout
    assert "\x1b" not in result.stdout + result.stderr  # no terminal, no control codes


def test_printed_commands_can_be_pasted_whatever_the_folder_is_called(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    runs = "my runs; $(touch pwned)"
    result = copus("submit", "job.yaml", "--set", f'launch.runs="{runs}"', worker=["--fail-at", "2"])
    commands = re.findall(r"(?:copus|tensorboard) [a-z-]+ .*", result.stdout)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.partition("   (")[0])
        assert [word for word in words if runs in word], command
        assert "touch" not in words


def test_tensorboard_is_named_only_where_it_has_the_curves(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    result = copus("submit", "job.yaml", "--set", "tracking={}", worker=["--steps", "1"])
    assert result.returncode == 0, result.stderr
    assert "copus report runs/small" in result.stdout
    assert "tensorboard" not in result.stdout


def test_a_job_without_a_queue_cannot_be_left_alone(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    ended = copus("submit", "job.yaml", "--detach")
    assert ended.returncode == 2
    assert ended.stderr == (
        "copus: --detach: launch.engine(local) has no queue: this command stays with the workers until they end\n"
    )
    assert not (tmp_path / "runs").exists()


def test_taken_names_are_numbered(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    for expected in ("small", "small-2", "small-3"):
        result = copus("submit", "job.yaml", "--json", worker=["--steps", "1"])
        values = json.loads(result.stdout)
        assert Path(values["run"]).name == expected
    assert values["reason"] == "finished"
    assert values["samples_consumed"] == 4
    assert values["tokens"] == 4 * 32


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupt_checkpoints_and_resume_goes_on(
    tmp_path: Path, copus: Copus, number: signal.Signals, exit_code: int
) -> None:
    write_job(tmp_path)
    run = tmp_path / "runs" / "small"
    with submitted(tmp_path, "job.yaml", worker=LONG) as process:
        wait_for(lambda: steps_seen(run) > 2)
        process.send_signal(number)
        output, errors = process.communicate(timeout=90)
    assert process.returncode == exit_code, errors
    assert "stopping at the next step, checkpointing" in output
    assert "copus submit --resume runs/small" in output
    done = int((run / "checkpoints" / "done").read_text())
    assert [event.reason for event in read_events(run) if isinstance(event, End)] == ["interrupted"]

    result = copus("submit", "--resume", "small", worker=["--steps", str(done + 3)])
    assert result.returncode == 0, result.stderr
    assert not (run / "stop").exists()
    assert [event.step for event in read_events(run) if isinstance(event, Step)] == list(range(1, done + 4))
    assert [event.resumed_from for event in read_events(run) if isinstance(event, Start)] == [None, "checkpoints/done"]


def test_a_reader_that_leaves_does_not_spoil_the_end(tmp_path: Path) -> None:
    """`copus submit … | tee log`: a Ctrl-C ends tee first, and then nobody reads."""
    write_job(tmp_path)
    run = tmp_path / "runs" / "small"
    with submitted(tmp_path, "job.yaml", worker=LONG) as process:
        wait_for(lambda: steps_seen(run) > 2)
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=90) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert (run / "checkpoints" / "done").exists()


def test_second_interrupt_kills(tmp_path: Path) -> None:
    write_job(tmp_path)
    run = tmp_path / "runs" / "small"
    with submitted(tmp_path, "job.yaml", worker=[*LONG, "--ignore-stop"]) as process:
        wait_for(lambda: steps_seen(run) > 2)
        process.send_signal(signal.SIGINT)
        wait_for((run / "stop").exists)
        time.sleep(0.5)
        assert process.poll() is None  # it waits for a worker that does not listen
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "newest checkpoint" in output
    assert worker_is_gone(run)


def test_resume_of_a_finished_run_does_nothing(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    copus("submit", "job.yaml", worker=["--steps", "2"])
    before = (tmp_path / "runs" / "small" / "events.jsonl").read_bytes()
    result = copus("submit", "--resume", "runs/small", worker=["--steps", "9"])
    assert result.returncode == 0
    assert "finished already" in result.stdout
    assert (tmp_path / "runs" / "small" / "events.jsonl").read_bytes() == before


def test_resume_from_another_folder_finds_the_text(
    tmp_path: Path, copus: Copus, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(tmp_path)
    (tmp_path / "text").mkdir()
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).rename(tmp_path / "text" / name)
    result = copus("submit", "job.yaml", "--set", "data.source=text", worker=["--steps", "1"])
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path / "runs")
    result = copus("submit", "--resume", "small", "--set", "training.tokens=25600", worker=["--steps", "2"])
    assert result.returncode == 0, result.stderr


def test_a_run_with_a_relative_text_is_gone_on_with(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    run = tmp_path / "runs" / "small"
    copus("submit", "job.yaml", worker=["--steps", "1"])
    values = yaml.safe_load((run / "job.yaml").read_text())
    values["data"]["source"] = ["one.txt", "two.txt"]
    (run / "job.yaml").write_text(yaml.safe_dump(values))
    result = copus("submit", "--resume", "runs/small", "--set", "training.tokens=25600", worker=["--steps", "2"])
    assert result.returncode == 0, result.stderr


def test_resume_takes_a_longer_run_but_no_other_model(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    copus("submit", "job.yaml", worker=["--steps", "2"])
    run = tmp_path / "runs" / "small"
    before = (run / "job.yaml").read_bytes()
    result = copus("submit", "--resume", "small", "--set", "model.layers=6", worker=["--steps", "3"])
    assert result.returncode == 2
    assert "model.layers is 4 in this run and cannot become 6" in result.stderr
    assert (run / "job.yaml").read_bytes() == before

    result = copus("submit", "--resume", "small", "--set", "training.tokens=25600", worker=["--steps", "3"])
    assert result.returncode == 0, result.stderr
    assert [event.step for event in read_events(run) if isinstance(event, Step)] == [1, 2, 3]


def test_resume_refuses_a_run_whose_workers_live(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    run = tmp_path / "runs" / "small"
    with submitted(tmp_path, "job.yaml", worker=LONG) as process:
        wait_for(lambda: steps_seen(run) > 2)
        result = copus("submit", "--resume", "small", worker=LONG)
        assert result.returncode == 2
        assert (
            result.stderr == f"copus: runs/small: its workers are still running (launched by process {process.pid})\n"
        )
        assert not (run / "stop").exists()
        assert process.poll() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nothing"], "no run nothing"),
        ([], "give a job file, or --resume RUN"),
        (["missing.yaml"], "missing.yaml: No such file or directory"),
        (["job.yaml", "--set", "data.held_out=[hamlet]"], "hamlet"),
        (["job.yaml", "--set", "cluster.nodes=2", "--set", "training.layout.dp=2"], "cluster.nodes(2)"),
        (["job.yaml", "--set", "launch.runs=one.txt"], "launch.runs"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(
    tmp_path: Path, copus: Copus, arguments: list[str], message: str
) -> None:
    write_job(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = copus("submit", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_cannot_be_written_to_is_one_line(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    copus("submit", "job.yaml", worker=["--steps", "2"])
    run = tmp_path / "runs" / "small"
    (run / "lock").unlink()
    (run / "lock").mkdir()
    result = copus("submit", "--resume", "small", "--set", "training.tokens=25600")
    assert result.returncode == 2
    assert result.stderr == f"copus: {run}/lock: Is a directory\n"


@pytest.mark.parametrize("stage", ["prepare", "profile_alone"])
def test_a_cancel_while_the_run_gets_ready_starts_no_workers(
    tmp_path: Path, copus: Copus, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    write_job(tmp_path)
    run = tmp_path / "runs" / "small"

    def cancelled(first: Any, *arguments: object) -> Any:
        print(LocalEngine().cancel(run, now=True))
        return (0, first) if stage == "prepare" else None

    monkeypatch.setattr(launch.submit, stage, cancelled)
    result = copus("submit", "job.yaml", worker=["--steps", "3"])
    assert result.returncode == 128 + signal.SIGTERM
    assert "it has no workers yet, and starts none" in result.stdout
    assert not (run / "worker-0.pid").exists()


def test_a_cancel_ends_data_preparation(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    with Interrupts() as interrupts:
        code = run_module([sys.executable, "-c", "import time; time.sleep(60)"], interrupts, stop=tmp_path / "stop")
    assert code == 128 + signal.SIGTERM


def test_an_interrupt_of_data_preparation_says_how_to_end_it_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """A tokenizer that is being trained hears of nothing for seconds."""
    interrupts = Interrupts()
    interrupts.count, interrupts.signal = 1, signal.SIGINT
    assert run_module([sys.executable, "-c", "import time; time.sleep(600)"], interrupts) == 130
    assert capfd.readouterr().err == "copus: stopping (once more: end at once)\n"


def test_what_a_terminal_sends_to_the_process_of_the_data_as_well_ends_it_by_sigterm_alone() -> None:
    """It is sent while that process imports what it needs, too: a traceback, and folders that are half written."""
    script = "import os, signal; [os.kill(os.getpid(), number) for number in (signal.SIGINT, signal.SIGHUP)]"
    assert run_module([sys.executable, "-c", script], Interrupts()) == 0


def test_a_terminal_that_is_closed_interrupts_once_unless_nohup_ignores_it() -> None:
    with Interrupts() as interrupts:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        assert (interrupts.count, interrupts.signal) == (1, signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)
        assert (interrupts.count, interrupts.signal) == (2, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
        assert interrupts.count == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_fails_that_is_written_to_a_terminal_which_is_gone(tmp_path: Path) -> None:
    script = (
        "import sys, time; from launch.interrupts import Interrupts\n"
        "with Interrupts() as interrupts:\n"
        "    print('ready', flush=True)\n"
        "    while not interrupts.count: time.sleep(0.01)\n"
        "    print('stopping', flush=True); print('stopping', file=sys.stderr, flush=True)\n"
        "open('seen', 'w').write(str(interrupts.signal))"
    )
    ours, terminal = os.openpty()
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | module_environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    assert os.read(ours, 100).startswith(b"ready")
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "seen").read_text() == str(int(signal.SIGHUP))


def test_failed_data_preparation_leaves_no_run(tmp_path: Path, copus: Copus) -> None:
    job = write_job(tmp_path)
    (tmp_path / "two.txt").write_text("too short")  # other data than what is prepared, and not enough of it
    result = copus("submit", str(job))
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs" / "small").exists()


def test_failure_is_told_in_one_line_with_the_log(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    result = copus("submit", "job.yaml", worker=["--fail-at", "3"])
    assert result.returncode == 1
    assert result.stderr.startswith("copus: rank 0 failed: the loss is [not] finite\n  logs: runs/small/logs\n")
    assert "copus submit --resume runs/small" in result.stdout


def test_workers_that_could_write_nothing_are_explained_by_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.attend.full_disk", lambda folder: f"the disk of {folder} is full, 0.0 MiB are free")
    assert copus_here("submit", "job.yaml", worker=["--crash-at", "3"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"copus: the disk of {tmp_path}/runs/small is full, 0.0 MiB are free: what the workers did last is not there; "
        "make room, then resume"
    )
    assert copus_here("submit", "--resume", "small", worker=["--fail-at", "4"]) == 1, "a failure that was told"


def test_the_command_that_goes_on_is_one_that_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that diverged at once has set its only checkpoint aside, and does not begin again unasked."""
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    for had_checkpoint, asks in ((False, ""), (True, " --allow-from-scratch")):
        monkeypatch.setattr("launch.conclusion.has_checkpoint", lambda run, had=had_checkpoint: had)
        assert copus_here("submit", "job.yaml", worker=["--fail-at", "3"]) == 1
        go_on = rf"copus submit --resume runs/small(-2)?{asks}   \(from the start: there is no checkpoint\)"
        assert re.search(go_on, capfd.readouterr().out)


def test_profile_fills_the_table_and_prints_it(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    result = copus("profile", "job.yaml", worker=[])
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"3 measured in {tmp_path}/table.jsonl\n"
    assert "measuring 3/3 TP2·PP1·DP1 B4 m1: 0.3 s" in result.stderr
    assert (tmp_path / "runs" / "small-profile" / "job.yaml").exists()


def test_data_says_where_the_data_lies(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    result = copus("data", "job.yaml", "--json")
    assert result.returncode == 0, result.stderr
    assert (Path(json.loads(result.stdout)["prepared"]) / "manifest.json").exists()


def test_what_the_user_has_to_fix_is_one_line_and_leaves_no_run(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    result = copus("submit", "job.yaml", worker=["--user-error-at", "0"])
    assert result.returncode == 2
    assert result.stderr == "copus: training.lr(0): too little\n"
    assert "too little" not in result.stdout
    assert not (tmp_path / "runs" / "small").exists()


def test_a_run_that_has_trained_is_kept_although_the_user_has_to_fix_something(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    result = copus("submit", "job.yaml", worker=["--user-error-at", "2"])
    assert result.returncode == 2
    assert steps_seen(tmp_path / "runs" / "small") == 1


def test_a_resume_that_the_workers_refuse_leaves_the_job_as_it_was(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    copus("submit", "job.yaml", worker=["--steps", "2"])
    run = tmp_path / "runs" / "small"
    before = (run / "job.yaml").read_text()
    longer = ["--set", "training.tokens=25600"]
    result = copus("submit", "--resume", "small", *longer, worker=["--user-error-at", "0"])
    assert result.returncode == 2
    assert (run / "job.yaml").read_text() == before


class TestAgent:
    """Through torch's elastic agent: slower, and so only what the agent has a part in."""

    def test_two_ranks_train_with_their_environment(self, tmp_path: Path, copus: Copus) -> None:
        write_job(tmp_path, launch={"threads_per_rank": 3})
        result = copus("submit", "job.yaml", worker=["--steps", "3"], how="agent")
        assert result.returncode == 0, result.stderr
        assert {path.name for path in (tmp_path / "runs/small").glob("worker-*.pid")} == {
            "worker-0.pid",
            "worker-1.pid",
        }

    def test_a_crash_names_the_rank_and_shows_its_last_words(self, tmp_path: Path, copus: Copus) -> None:
        write_job(tmp_path, launch={"max_restarts": 0})
        worker = ["--crash-at", "3", "--step-seconds", "0.2"]
        result = copus("submit", "job.yaml", worker=worker, how="agent")
        assert result.returncode == 1
        assert result.stderr.startswith("copus: rank 1 ended without saying why (exit code 1)\n")
        assert re.search(r"last lines of runs/small/logs/\S+/attempt_0/1/stderr.log:\n.*is out of luck", result.stderr)

    def test_workers_are_not_restarted_after_an_error_that_the_user_has_to_fix(
        self, tmp_path: Path, copus: Copus
    ) -> None:
        write_job(tmp_path, launch={"max_restarts": 3})
        worker = ["--user-error-at", "0"]
        result = copus("submit", "job.yaml", worker=worker, how="agent")
        assert result.returncode == 2
        assert result.stderr == "copus: training.lr(0): too little\n"
        assert (tmp_path / "runs" / "starts-0").read_text() == "started\n"
        assert not (tmp_path / "runs" / "small").exists()

    def test_workers_are_restarted_after_any_other_error(self, tmp_path: Path, copus: Copus) -> None:
        write_job(tmp_path, launch={"max_restarts": 1})
        assert copus("submit", "job.yaml", worker=["--fail-at", "1"], how="agent").returncode == 1
        assert (tmp_path / "runs" / "starts-0").read_text() == "started\n" * 2

    def test_workers_do_not_outlive_a_killed_launcher(self, tmp_path: Path) -> None:
        write_job(tmp_path)
        run = tmp_path / "runs" / "small"
        with submitted(tmp_path, "job.yaml", worker=LONG, how="agent") as process:
            wait_for(lambda: steps_seen(run) > 2 and (run / "worker-1.pid").exists())
            os.kill(process.pid, signal.SIGKILL)
            wait_for(lambda: worker_is_gone(run, 0) and worker_is_gone(run, 1))
        wait_for((run / "checkpoints" / "done").exists)  # they were asked, not killed

    def test_a_rank_is_of_the_newest_attempt_and_stops_when_its_agent_was_killed_at_its_start(
        self, tmp_path: Path
    ) -> None:
        """Long before it listens: imports take seconds."""
        path = write_job(tmp_path, cluster={"accelerators_per_node": 1}, training={"layout": {}})
        job = load_job(path, [f"launch.runs={tmp_path}"])
        run = create_run(job)
        worker = tmp_path / "worker.py"
        worker.write_text(
            "import os, sys, time\nfrom pathlib import Path\nfrom copus.fencing import TOKEN\n"
            "from copus.stop_request import StopRequest\nrun = Path(sys.argv[1])\n"
            "(run / 'new').write_text(os.environ[TOKEN])\n(run / 'new').rename(run / 'begun')\n"
            "while not (run / 'killed').exists():\n    time.sleep(0.01)\n"
            "stop = StopRequest(run)\nwhile not stop():\n    time.sleep(0.01)\n(run / 'stopped').touch()\n"
        )
        with lock_run(run) as lock:
            workers = LocalEngine(worker=[str(worker)]).start(run, job, lock)
            try:
                wait_for((run / "begun").exists)
                assert (run / "begun").read_text() == (run / "session").read_text()
                os.kill(workers._agent.pid, signal.SIGKILL)
                assert workers._agent.wait() == -signal.SIGKILL
                (run / "killed").touch()
                wait_for((run / "stopped").exists)
            finally:
                workers.kill()

    def test_second_interrupt_kills_every_rank(self, tmp_path: Path) -> None:
        write_job(tmp_path)
        run = tmp_path / "runs" / "small"
        with submitted(tmp_path, "job.yaml", worker=[*LONG, "--ignore-stop"], how="agent") as process:
            wait_for(lambda: steps_seen(run) > 2 and (run / "worker-1.pid").exists())
            process.send_signal(signal.SIGINT)
            wait_for((run / "stop").exists)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=90)
        assert process.returncode == 130
        assert worker_is_gone(run, 0)
        assert worker_is_gone(run, 1)
