"""A job on several nodes learns how fast its network is."""

from pathlib import Path

import pytest
import torch

from copus import network
from copus.job import JobConfig, load_job
from planner.move_costs import expected_layout_seconds
from profiles.accelerator import accelerator, on_network
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel
from profiles.layout import Layout
from tests.megatron_jobs import tiny_job
from tests.ranks import own_device, run_ranks

MODEL = load_job(Path(__file__).parent.parent / "benchmarks" / "time_to_target.yaml").model
PAIR = Cluster(nodes=2, accelerators_per_node=1)
SHEET_GBIT = accelerator("cpu").between_nodes.bytes_per_second * 8 / 1e9


def _measured(ranks_per_node: int) -> float:
    return network.gbit_per_second(ranks_per_node, own_device())


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(2, 1), (3, 1), (4, 2)])
def test_all_ranks_measure_the_same_bandwidth(ranks: int, ranks_per_node: int) -> None:
    measured = run_ranks(ranks, _measured, ranks_per_node)
    assert len(set(measured)) == 1
    assert 0.05 < measured[0] < 1000  # Gbit/s through this machine's memory, however busy it is


@pytest.mark.parametrize(
    ("measured", "believed"),
    [
        (0.0961, 0.096),
        (SHEET_GBIT / 2.1, SHEET_GBIT / 2.1),
        (SHEET_GBIT / 1.9, None),
        (SHEET_GBIT * 1.9, None),
        (104.2, 100),
    ],
)
def test_a_network_that_is_not_the_data_sheets_is_believed(
    measured: float, believed: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "gbit_per_second", lambda ranks_per_node, device: measured)
    monkeypatch.setattr(network, "all_gather", lambda value: [value, value])
    there = network.on_measured_network(_job(PAIR), torch.device("cpu"))
    assert there.cluster.network_gbit_per_second == (believed and pytest.approx(believed, rel=0.05))
    assert there.training == _job(PAIR).training


@pytest.mark.parametrize(
    "cluster",
    [
        Cluster(accelerators_per_node=2),
        Cluster(nodes=2, accelerators_per_node=1, network_gbit_per_second=3.0),
        Cluster(nodes=2, accelerators_per_node=1, accelerator="a-card-without-a-sheet"),
        Cluster(nodes=2, accelerators_per_node=4, accelerator="gb200"),
    ],
    ids=["one node", "the job says it", "no data sheet", "one NVLink domain"],
)
def test_nothing_is_measured_without_need(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(network, "gbit_per_second")
    job = _job(cluster)
    assert network.on_measured_network(job, torch.device("cpu")) is job


def test_nothing_is_measured_between_nodes_of_unequal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(network, "gbit_per_second")
    monkeypatch.setattr(network, "all_gather", lambda value: ["3", "3", "3", "1"])
    job = _job(Cluster(nodes=4, accelerators_per_node=1))
    assert network.on_measured_network(job, torch.device("cpu")) is job


def test_predictions_and_moves_follow_the_network_that_the_job_names() -> None:
    pipeline, data = Layout(pp=2), Layout(dp=2)
    layouts = [Layout(tp=2), pipeline, data]
    tried = Configurations.of([Configuration(layout=one, micro_batch=2, global_batch=8) for one in layouts])
    seconds = {}
    for gbit in (None, 0.1):
        there = PAIR.model_copy(update={"network_gbit_per_second": gbit})
        seconds[gbit] = CostModel().predict(MODEL, there, tried, "fp32").seconds
    assert (seconds[0.1] > seconds[None]).all()
    assert seconds[0.1].argmin() == layouts.index(pipeline)  # as measured: docs/hosts.md
    slow = PAIR.model_copy(update={"network_gbit_per_second": 0.1})
    assert expected_layout_seconds(MODEL, slow, data, "fp32") > 2 * expected_layout_seconds(MODEL, PAIR, data, "fp32")


def test_the_accelerators_of_a_node_share_its_network() -> None:
    cluster = Cluster(nodes=2, accelerators_per_node=8, accelerator="h100-sxm", network_gbit_per_second=400)
    assert on_network(cluster).between_nodes.bytes_per_second == pytest.approx(400e9 / 8 / 8)
    assert on_network(cluster).inside_node == accelerator("h100-sxm").inside_node


def _job(cluster: Cluster) -> JobConfig:
    return tiny_job(cluster.accelerators).model_copy(update={"cluster": cluster})
