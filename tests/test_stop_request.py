"""Who looks for a request to stop, and what counts as one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from copus.stop_request import AGENT, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("rank", "looks"), [("0", True), ("1", False)])
def test_one_rank_looks_for_the_file_and_every_rank_hears_a_signal(
    rank: str, looks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step asks all ranks; on a shared file system each look is a question to its server."""
    monkeypatch.setenv("RANK", rank)
    stop = StopRequest(tmp_path)
    assert not stop()
    (tmp_path / "stop").touch()
    assert stop() == looks
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop()


def test_the_agent_may_have_died_before_the_rank_asks_for_the_first_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AGENT, str(os.getppid()))
    assert not StopRequest(tmp_path)()
    monkeypatch.setenv(AGENT, str(os.getpid()))  # whoever is the parent now, it is another one
    assert StopRequest(tmp_path)()


def test_a_program_between_the_agent_and_the_rank_is_no_death_of_the_agent(tmp_path: Path) -> None:
    """As PYTHON_EXEC puts it there, for instance a profiler."""
    code = "import sys; from pathlib import Path; from copus.stop_request import StopRequest\n"
    code += "print(StopRequest(Path(sys.argv[1]))())"
    between = ["sh", "-c", '"$@"; exit $?', "between", sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {AGENT: str(os.getpid())}
    assert subprocess.run(between, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout == "False\n"
