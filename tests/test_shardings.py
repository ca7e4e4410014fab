"""What data parallel ranks share out, to the planner: candidates, memory, traffic; and one job planned on several
backends."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_job_estimate import JOB

from copus.backends.registry import find_backend
from copus.job import load_job
from launch.plan_backends import plan_backends
from planner.config import PlannerConfig
from planner.space import candidates
from profiles.accelerator import accelerator
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.work import HOST_OPTIMIZER_SECONDS, work
from profiles.layout import Layout
from profiles.memory import MemoryModel
from profiles.model_shape import ModelShape

MODEL = ModelShape(**JOB["model"])  # type: ignore[arg-type]
NODES = Cluster(nodes=2, accelerators_per_node=8, accelerator="h100-sxm")


def _with(layout: Layout, global_batch: int = 16) -> Configuration:
    return Configuration(layout=layout, micro_batch=1, global_batch=global_batch)


def test_fsdp_leaves_every_zero_stage_and_a_copy_for_each_node_to_the_planner() -> None:
    start = _with(Layout(dp=16, zero=3))
    space = candidates(PlannerConfig(recompute="none"), MODEL, NODES, start, find_backend("fsdp"))
    shardings = {(each.layout.tp, each.layout.zero, each.layout.dp_replicate) for each in space}
    plain = {(tp, zero, 1) for tp in (1, 2, 4, 8) for zero in range(4)}
    assert shardings == plain | {(tp, zero, 2) for tp in (1, 2, 4) for zero in (1, 2, 3)}
    assert {each.layout.pp for each in space} == {1}
    of_megatron = candidates(PlannerConfig(), MODEL, NODES, _with(Layout(dp=16, zero=1)), find_backend("megatron"))
    assert {(each.layout.zero, each.layout.dp_replicate) for each in of_megatron} == {(1, 1)}


def test_a_copy_on_each_node_takes_more_memory_and_less_of_the_network() -> None:
    """With two micro-batches, between which every rank keeps its share of the gradients."""
    arrays = Configurations.of(_with(Layout(dp=16, zero=3, dp_replicate=copies), 32) for copies in (1, 2))
    how = find_backend("fsdp").implementation(dropout=False)
    memory = MemoryModel(how).predict(MODEL, arrays, "bf16", coverage=None).breakdown
    for part, each_weight in (("optimizer", 12), ("gradients", 4)):
        np.testing.assert_allclose(memory[part], each_weight * MODEL.parameters / np.array([16, 8]), rtol=1e-6)
    assert (memory["weights"] == 0).all()  # gathered layers are buffers
    done = work(MODEL, NODES, accelerator("h100-sxm"), arrays, "bf16")
    assert done.layer_gather[1] < 0.9 * done.layer_gather[0]
    assert done.congestion.tolist() == [1, 0], "what is gathered in every layer stays on a node"
    assert done.dp_reduce[0] == 0
    assert done.dp_reduce[1] > 0  # the copies add up their gradients


def test_the_root_of_fsdp_stays_gathered_while_the_layers_run() -> None:
    """By hand, in bf16 with ZeRO 3. At the loss: embedding, last norm, output layer, the last two layers, and the
    buffer in which the last one was gathered; no gradient yet. If nothing but the root is large, the reduction of its
    gradient is the fullest moment: in bf16, and in fp32; that buffer is still there."""
    arrays = Configurations.of([_with(Layout(dp=16, zero=3))])
    how = find_backend("fsdp").implementation(dropout=False)
    root = MODEL.padded_vocab * MODEL.hidden * (1 if MODEL.tied_embeddings else 2)
    layer = (MODEL.parameters - root - MODEL.hidden) / MODEL.layers
    memory = MemoryModel(how).predict(MODEL, arrays, "bf16", coverage=None).breakdown
    assert memory["communication"][0] == pytest.approx(2 * (root + MODEL.hidden + 3 * layer), rel=1e-6)
    assert memory["gradients"][0] == 0
    wide = MODEL.model_copy(update={"vocab": 10**8, "seq_len": 1})
    at_the_end = MemoryModel(how).predict(wide, arrays, "bf16", coverage=None).breakdown
    root *= wide.padded_vocab / MODEL.padded_vocab
    assert at_the_end["communication"][0] == pytest.approx(6 * root + 2 * layer, rel=1e-6)


def test_an_offloaded_optimizer_takes_no_device_memory_and_more_time() -> None:
    arrays = Configurations.of(_with(Layout(dp=16, zero=3, offload_optimizer=offload)) for offload in (False, True))
    assert arrays[1].layout.label == "TP1·PP1·DP16·Z3·offload"
    how = find_backend("deepspeed").implementation(dropout=False)
    kept, offloaded = MemoryModel(how).predict(MODEL, arrays, "bf16", coverage=None).peak_bytes
    assert kept - offloaded == pytest.approx(16 * MODEL.parameters / 16, rel=1e-6)
    done = work(MODEL, NODES, accelerator("h100-sxm"), arrays, "bf16")
    assert done.optimizer[1] == pytest.approx(HOST_OPTIMIZER_SECONDS * MODEL.parameters / 16, rel=0.01)
    assert done.optimizer[1] > 100 * done.optimizer[0]


def test_layouts_that_the_planner_makes_keep_the_optimizer_where_it_is() -> None:
    start = _with(Layout(dp=16, zero=3, offload_optimizer=True))
    space = candidates(PlannerConfig(recompute="none"), MODEL, NODES, start, find_backend("deepspeed"))
    assert {each.layout.offload_optimizer for each in space} == {True}


def test_an_fp32_job_of_fsdp_computes_with_copies_of_its_weights() -> None:
    arrays = Configurations.of([_with(Layout(dp=16, zero=1))])
    how = find_backend("fsdp").implementation(dropout=False)
    memory = MemoryModel(how).predict(MODEL, arrays, "fp32", coverage=None).breakdown
    assert memory["weights"][0] == pytest.approx(4 * MODEL.parameters)
    assert memory["optimizer"][0] == pytest.approx(12 * MODEL.parameters / 16)


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A job that only Megatron runs as it stands."""
    training = JOB["training"] | {"layout": {"tp": 4, "pp": 2, "dp": 2, "sequence_parallel": True, "zero": 1}}  # type: ignore[operator]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"training": training, "profile": {"table": str(tmp_path / "table.jsonl")}}))
    return path


def test_backends_are_compared_in_one_table(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_backends(job_file, [], ["megatron", "fsdp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["16"], ["32"], ["64"], ["128"])]
    assert sorted(row[1] for row in rows if row[0] == "32") == ["fsdp", "megatron"]
    for batch in ("16", "32", "64", "128"):
        rates = [float(row[4]) for row in rows if row[0] == batch]
        assert rates == sorted(rates, reverse=True), "the fastest comes first"


def test_the_comparison_as_values_names_the_backends(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_backends(job_file, [], ["megatron", "fsdp"], as_json=True)
    values = json.loads(capsys.readouterr().out)
    assert values.keys() == {"schema_version", "megatron", "fsdp"}
    assert values["megatron"]["start"]["configuration"]["layout"]["pp"] == load_job(job_file).training.layout.pp == 2
    assert values["fsdp"]["start"]["configuration"]["layout"]["pp"] == 1
