"""Data sheets of accelerators: files of the user, short names, names that are nearly right."""

import math
from pathlib import Path

import pytest
import yaml

from copus.job import JobError, load_job
from launch.plan import plan
from launch.run_directory import portable
from profiles.accelerator import accelerator, accelerators, link
from profiles.cluster import Cluster
from profiles.hardware import is_hardware_of, name_hardware

JOB = """
name: mine
model: {{layers: 4, hidden: 256, ffn_hidden: 704, heads: 4, kv_heads: 4, seq_len: 128, vocab: 1000}}
cluster: {{accelerators_per_node: 4, accelerator: {accelerator}}}
training: {{layout: {{dp: 4}}, global_batch: 16, tokens: 1_000_000}}
planner: {{max_global_batch: 32}}
"""
MY_CARD = """
flops: {bf16: 1.0e14}
memory_bytes: 3.2e10
memory_bytes_per_second: 1.0e12
inside_node: pcie-4
between_nodes: {kind: my network, bytes_per_second: 1.0e9}
sources: [measured here]
"""


def job_file(folder: Path, name: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(JOB.format(accelerator=name))
    return path


@pytest.mark.parametrize("name", accelerators())
def test_figures_are_in_the_units_of_their_names(name: str) -> None:
    """A slip of a factor of a thousand is none of an accelerator from V100 to GB300, or of a CPU core."""
    device = accelerator(name)
    if not device.rated:
        return
    assert 5e13 < device.flops.get("bf16", device.flops.get("fp16", 0)) < 5e15
    assert device.flops.get("fp8", math.inf) >= device.flops.get("bf16", 0)
    assert 1.5e10 < device.memory_bytes < 4e11
    assert 2.5e11 < device.memory_bytes_per_second < 1e13
    assert 1e9 < device.between_nodes.bytes_per_second <= device.inside_node.bytes_per_second < 1e12


def test_a_card_of_the_user_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tmp_path / "my-card.yaml"
    card.write_text(MY_CARD)
    job = load_job(job_file(tmp_path, str(card)))
    assert job.training.precision == "bf16"
    assert accelerator(job.cluster.accelerator).name == "my-card"
    assert accelerator(job.cluster.accelerator).inside_node == link("pcie-4")
    assert plan(job_file(tmp_path, str(card)), []) == 0
    assert "29.8 GiB each" in capsys.readouterr().out


def test_its_path_is_absolute_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-card.yaml").write_text(MY_CARD)
    monkeypatch.chdir(tmp_path)
    job = portable(load_job(job_file(tmp_path, "my-card.yaml")))
    assert job.cluster.accelerator == str(tmp_path / "my-card.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("[1]", "a data sheet is a mapping"),
        ("{", "while parsing"),
        (MY_CARD.replace("memory_bytes: 3.2e10", "memory: 3.2e10"), "memory_bytes: Field required"),
        (MY_CARD.replace("pcie-4", "pcie-9"), "link(pcie-9) is unknown"),
    ],
)
def test_a_file_that_is_no_data_sheet_is_refused_in_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    card = tmp_path / "card.yaml"
    if content is not None:
        card.write_text(content)
    with pytest.raises(JobError) as refused:
        load_job(job_file(tmp_path, str(card)))
    assert message in str(refused.value)
    assert "cluster.accelerator: " in str(refused.value)


def test_a_short_name_is_replaced_and_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    path = job_file(tmp_path, "h100")
    assert load_job(path, notice=lines.append).cluster.accelerator == "h100-sxm"
    assert lines == [f"{path}: cluster.accelerator(h100) is taken as h100-sxm"]


def test_a_name_that_is_nearly_right_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"accelerator\(h100-smx\) is unknown: did you mean h100-sxm"):
        accelerator("h100-smx")
    with pytest.raises(ValueError, match=r"accelerator\(abacus\) is unknown: expected one of a100-40g"):
        accelerator("abacus")


@pytest.mark.parametrize(
    ("name", "device", "other"),
    [
        ("h100-pcie", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3"),
        ("h100-sxm", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"),
        ("rtx-4090", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090"),
        ("rtx-6000-ada", "NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "NVIDIA RTX 6000 Ada Generation"),
        ("l4", "NVIDIA L4", "NVIDIA L40S"),
        ("a100-80g", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"),
        ("mi300x", "AMD Instinct MI300X", "AMD Instinct MI325X"),
    ],
)
def test_measurements_of_an_accelerator_are_known_by_its_name(name: str, device: str, other: str) -> None:
    cluster = Cluster(accelerators_per_node=8, accelerator=name)
    assert is_hardware_of(name_hardware(device, 1, 8), cluster)
    assert not is_hardware_of(name_hardware(other, 1, 8), cluster)


def test_a_data_sheet_of_the_user_is_written_as_those_that_come_along() -> None:
    values = yaml.safe_load(MY_CARD)
    sheet = accelerator("h100-sxm")
    assert values.keys() <= type(sheet).model_fields.keys()
