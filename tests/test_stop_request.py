"""Who looks for a request to stop, and what counts as one."""

import os
import signal
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
