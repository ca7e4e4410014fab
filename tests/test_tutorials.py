"""The tutorials of docs/, each run as it stands."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import install, slurm_cluster
from tutorials import BLOCK, PAGES, ROOT, blocks, follow

from copus.events import End, Start, read_events
from profiles.table import ThroughputTable


@pytest.mark.parametrize("reader", PAGES)
def test_a_tutorial_has_commands_and_says_which_blocks_are_not_run(reader: str) -> None:
    assert sum(block.language == "sh" for block in blocks(reader)) >= 3
    for block in blocks(reader):
        assert block.title or block.language in ("sh", "text"), f"{block.text!r} is neither run nor output"
    text = (ROOT / "docs" / PAGES[reader]).read_text()
    assert text.count("\n```") == 2 * len(BLOCK.findall(text)), "every block begins and ends at the margin"


def _reasons(run: Path) -> list[str]:
    return [event.reason for event in read_events(run) if isinstance(event, End)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_for_a_laptop_runs_as_it_stands(tmp_path: Path) -> None:
    said = follow("laptop", tmp_path, {})
    assert "audit: speed to the same progress" in said
    assert (tmp_path / "runs" / "shakespeare" / "report.html").is_file()
    assert _reasons(tmp_path / "runs" / "mine") == ["finished"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorial_for_fsdp_and_deepspeed_runs_as_it_stands(tmp_path: Path) -> None:
    follow("fsdp", tmp_path, {})
    runs = [event.backend for event in read_events(tmp_path / "runs" / "tuned") if isinstance(event, Start)]
    assert runs == ["fsdp", "deepspeed"]
    assert (tmp_path / "tuned-hf" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_for_batch_sizes_runs_as_it_stands(tmp_path: Path) -> None:
    follow("batch size", tmp_path, {})
    calibration = json.loads((tmp_path / "runs" / "fixed" / "calibration.json").read_text())
    assert "critical_batch_factor" in calibration
    assert (tmp_path / "comparison.html").is_file()


@pytest.mark.slow
def test_the_tutorial_for_profilers_runs_as_it_stands(tmp_path: Path) -> None:
    follow("profiler", tmp_path, {})
    assert len(list(ThroughputTable(tmp_path / "tried.jsonl").rows())) >= 4


@pytest.fixture
def cluster() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder, and the environment of Slurm's programs."""
    why_not = install()
    if why_not:
        pytest.skip(f"no Slurm here: {why_not}")
    with tempfile.TemporaryDirectory(prefix="copus-slurm-") as folder:
        Path(folder).chmod(0o755)  # munge refuses folders that others might write to
        with slurm_cluster(Path(folder)) as environment:
            yield Path(folder), environment


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_the_tutorial_for_slurm_runs_as_it_stands(cluster: tuple[Path, dict[str, str]]) -> None:
    folder, environment = cluster
    follow("slurm", folder, environment)
    assert _reasons(folder / "runs" / "mine") == ["finished", "finished"]
    assert (folder / "mine-megatron" / "release").is_dir()
