"""The benchmark of faults: its own arithmetic, and, slowly, a handful of real faults."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fault_files import largest_difference, spoil
from benchmarks.faults import lineage
from copus.events import Event
from tests.launch_events import start, step, write_run


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([step(4), step(8), step(12)], (0, 0)),
        ([step(4), step(8), start(4), step(8), step(12)], (0, 0)),
        ([step(4), step(12)], (4, 0)),
        ([step(4), step(8), step(8), step(12)], (0, 4)),
        ([step(4), step(8)], (4, 0)),
    ],
)
def test_samples_lost_and_repeated_are_counted(events: list[Event], expected: tuple[int, int], tmp_path: Path) -> None:
    assert lineage(write_run(tmp_path, start(), *events), 12) == expected


def test_any_difference_counts() -> None:
    one = {"a": torch.zeros(3), "b": torch.ones(())}
    assert largest_difference(one, {name: tensor.clone() for name, tensor in one.items()}) == 0
    assert largest_difference(one, {"a": torch.zeros(3), "b": torch.ones(()) * 1.5}) == 0.5
    assert largest_difference(one, {"a": torch.zeros(3)}) == float("inf")


@pytest.mark.parametrize("kind", ["truncated file", "flipped bit"])
def test_what_is_spoilt_is_changed(kind: str, tmp_path: Path) -> None:
    for seed in range(20):
        (tmp_path / "file").write_bytes(bytes(100))
        assert "file of" in spoil(tmp_path, kind, random.Random(seed)) or kind == "flipped bit"
        assert (tmp_path / "file").read_bytes() != bytes(100)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_a_handful_of_faults_is_survived() -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["faults"]) >= 4
    assert all(fault["ok"] for fault in result["faults"])
    assert result["samples_lost"] == result["samples_repeated"] == 0
