"""The lock on file systems without `flock`, among real processes, in which `flock` fails as it does there."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launch_jobs import copus_command, write_job

import launch.lease
from launch.lease import HeldError, Lease, holder_of

ROOT = Path(__file__).resolve().parent.parent
NO_LOCKS = """
import errno, fcntl

def flock(descriptor, kind):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = flock
"""
"""For a `sitecustomize.py`, which every Python process reads as it starts."""
HOLD = """
import subprocess, sys, time
from pathlib import Path
from launch.run_directory import lock_run
with lock_run(Path(sys.argv[1]), "the test") as descriptor:
    if len(sys.argv) > 2:
        subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[descriptor])
    print("held", flush=True)
    time.sleep(600)
"""
COUNT = """
import sys, time
from pathlib import Path
from launch.run_directory import lock_run
run = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with lock_run(run, "the test", 60):
        number = int((run / "number").read_text())
        time.sleep(0.01)
        (run / "number").write_text(str(number + 1))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of processes in which `flock` fails."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NO_LOCKS)
    return os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}


def start(code: str, environment: dict[str, str], *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def hold(run: Path, environment: dict[str, str], *arguments: object) -> "subprocess.Popen[str]":
    """A process that has the lock."""
    process = start(HOLD, environment, run, *arguments)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def keeper(run: Path, number: int = 1) -> int:
    return int((run / f"lock.{number}").read_text().splitlines()[1])


def wait_until_free(run: Path, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while holder_of(run / "lock") is not None:
        assert time.monotonic() < end, "it is held for ever"
        time.sleep(0.02)


def elsewhere(run: Path, number: int = 1) -> Path:
    """A lease of another machine."""
    file = run / f"lock.{number}"
    file.write_text('{"machine": "another", "holder": "Slurm job 7 on n7"}\n4242\n')
    return file


def test_processes_that_count_under_the_lock_lose_no_number(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "number").write_text("0")
    for process in [start(COUNT, environment, tmp_path, 6) for _ in range(3)]:
        assert process.wait(120) == 0
    assert (tmp_path / "number").read_text() == "18"
    assert len(list(tmp_path.glob("lock.*"))) == 1


def test_others_are_told_who_holds_it_and_a_killed_holder_lets_go(tmp_path: Path, environment: dict[str, str]) -> None:
    process = hold(tmp_path, environment)
    try:
        assert holder_of(tmp_path / "lock") == "the test"
        with pytest.raises(HeldError, match="the test"):
            Lease(tmp_path / "lock", "us", 0.1)
    finally:
        process.kill()
        process.wait()
    wait_until_free(tmp_path)
    Lease(tmp_path / "lock", "us", 0.1).close()


def test_it_is_held_as_long_as_any_process_has_the_descriptor(tmp_path: Path, environment: dict[str, str]) -> None:
    process = hold(tmp_path, environment, 4)
    process.kill()
    process.wait()
    with pytest.raises(HeldError, match="the test"):  # by the sleep
        Lease(tmp_path / "lock", "us", 0.1)
    wait_until_free(tmp_path)


def test_a_holder_whose_keeper_was_killed_with_it_is_replaced_at_once(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    process = hold(tmp_path, environment)
    for pid in (keeper(tmp_path), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_until_free(tmp_path)
    Lease(tmp_path / "lock", "us", 0.1).close()


def test_a_lost_machine_is_waited_for_and_then_replaced_whatever_its_clock_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.lease, "LEASE_SECONDS", 1.0)
    os.utime(elsewhere(tmp_path), (2e9, 2e9))
    begin = time.monotonic()
    Lease(tmp_path / "lock", "us", 0.1).close()
    assert time.monotonic() - begin > 1.0
    assert [file.name for file in tmp_path.glob("lock.*")] == ["lock.2"]


def test_another_machine_that_renews_keeps_it_although_its_clock_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ended = elsewhere(tmp_path), threading.Event()

    def renew() -> None:
        number = 1000
        while not ended.wait(0.2):
            os.utime(file, (number, number))
            number += 1

    monkeypatch.setattr(launch.lease, "LEASE_SECONDS", 2.0)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(HeldError, match="Slurm job 7 on n7"):
            Lease(tmp_path / "lock", "us", 3.0)
    finally:
        ended.set()
        thread.join()


def test_of_many_that_find_a_lease_ended_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.lease, "LEASE_SECONDS", 1.0)
    elsewhere(tmp_path)
    got: list[Lease] = []

    def take() -> None:
        with contextlib.suppress(HeldError):
            got.append(Lease(tmp_path / "lock", "one of them", 0.1))

    monkeypatch.setattr(launch.lease, "RELEASE_SECONDS", 5.0)
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    monkeypatch.setattr(launch.lease, "LEASE_SECONDS", 60.0)
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].close()
    assert holder_of(tmp_path / "lock") is None


def test_a_job_is_trained_where_flock_fails_and_keeps_others_out(tmp_path: Path, environment: dict[str, str]) -> None:
    write_job(tmp_path)
    run = tmp_path / "runs" / "small"
    command = copus_command("submit", "job.yaml", worker=["--steps", "3000", "--step-seconds", "0.2"])
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as job:
        end = time.monotonic() + 60
        while not (run / "events.jsonl").exists():
            assert time.monotonic() < end
            time.sleep(0.05)

        def other(*arguments: str) -> "subprocess.CompletedProcess[str]":
            command = copus_command(*arguments)
            return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

        refused = other("submit", "--resume", "small")
        assert refused.stderr == f"copus: runs/small: its workers are still running (launched by process {job.pid})\n"
        assert refused.returncode == 2
        assert "its workers stop at the next step" in other("cancel", "small").stdout
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGTERM, output
    wait_until_free(run)
