"""Memory that control groups leave, from files as the kernel writes them."""

import math
from pathlib import Path

import pytest

from copus import hardware
from copus.cgroups import memory_left


def _group(root: Path, line: str, files: dict[str, str]) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_the_tightest_group_above_counts(tmp_path: Path) -> None:
    _group(
        tmp_path,
        "0::/job/step",
        {
            "job/memory.max": "1000",
            "job/memory.current": "700",
            "job/memory.stat": "anon 600\ninactive_file 50",
            "job/step/memory.max": "max",
            "job/step/memory.current": "600",
            "job/step/memory.stat": "inactive_file 50",
        },
    )
    assert memory_left(tmp_path) == 350


def test_version_1_in_a_container_that_does_not_see_its_path(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "1000",
        "memory/memory.usage_in_bytes": "400",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100",
    }
    _group(tmp_path, "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc", files)
    assert memory_left(tmp_path) == 700


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_no_limit_leaves_what_the_machine_has(tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _group(tmp_path, "0::/", {"memory.max": limit, "memory.current": "1", "memory.stat": "inactive_file 0"})
    left = memory_left(tmp_path)
    assert left > 2**62
    monkeypatch.setattr(hardware, "memory_left", lambda: left)
    assert 0 < hardware.room_for_a_copy() < 2**50


def test_a_rank_may_take_its_part_of_half_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory_left", lambda: 800.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert hardware.room_for_a_copy() == 100


def test_a_system_without_groups_has_no_limit(tmp_path: Path) -> None:
    assert memory_left(tmp_path) == math.inf
