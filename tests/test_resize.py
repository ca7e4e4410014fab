"""The same job on another number of ranks: what is chosen, and what stays."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copus.backends import registry
from copus.job import JobConfig, JobError, dump_job, parse_job
from copus.resize import fits, fitting, found_cluster, load_resized, resized
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.throughput import Prediction

MODEL = {"layers": 4, "hidden": 32, "ffn_hidden": 48, "heads": 4, "kv_heads": 4, "seq_len": 16, "vocab": 250}


def job(ranks: int = 4, layout: dict[str, object] | None = None, **sections: dict[str, object]) -> JobConfig:
    training = {"layout": layout or {"dp": ranks}, "global_batch": 8, "tokens": 16000, "micro_batch": 2}
    values = {
        "name": "tiny",
        "model": MODEL,
        "cluster": {"accelerators_per_node": ranks},
        "training": {**training, **sections.pop("training", {})},
        **sections,
    }
    return parse_job(values)


def chosen(layout: dict[str, object], ranks: int, batch: int = 8, micro_batch: int = 2) -> Configuration:
    before = Layout.model_validate(layout)
    current = Configuration(layout=before, micro_batch=micro_batch, global_batch=batch)
    return fitting(current, job(before.accelerators, layout), Cluster(accelerators_per_node=ranks))


def test_fewer_replicas_where_the_split_still_fits() -> None:
    assert chosen({"tp": 2, "dp": 2}, 2) == Configuration(layout=Layout(tp=2), micro_batch=2, global_batch=8)
    assert chosen({"pp": 2, "dp": 2}, 8) == Configuration(layout=Layout(pp=2, dp=4), micro_batch=2, global_batch=8)


def test_another_split_only_where_it_must_be_and_the_distributed_optimizer_stays() -> None:
    found = chosen({"tp": 2, "pp": 2, "zero": 1}, 2)
    assert found.layout.tp * found.layout.pp == 2
    assert found.layout.zero == 1
    assert chosen({"tp": 2, "pp": 1}, 1).layout == Layout()


def test_the_batch_stays_and_the_micro_batch_gives_way() -> None:
    assert chosen({"dp": 2}, 4, batch=8, micro_batch=4) == Configuration(
        layout=Layout(dp=4), micro_batch=2, global_batch=8
    )


def test_a_batch_that_cannot_stay_gets_smaller() -> None:
    found = chosen({"dp": 4}, 3)
    assert found.layout == Layout(dp=3)
    assert found.global_batch == 6


@given(st.integers(1, 12), st.sampled_from([{"dp": 4}, {"tp": 2, "dp": 2}, {"tp": 2, "pp": 2}, {"pp": 4}]))
def test_whatever_is_chosen_fits(ranks: int, layout: dict[str, object]) -> None:
    cluster = Cluster(accelerators_per_node=ranks)
    current = Configuration(layout=Layout.model_validate(layout), micro_batch=2, global_batch=8)
    found = fitting(current, job(4, layout), cluster)
    assert fits(found.layout, job(4, layout), cluster)
    assert found.layout.accelerators == ranks
    smaller = resized(job(4, layout), cluster)
    assert smaller.cluster == cluster
    assert smaller.reference_batch == 8, "the learning rate is for the batch that it was for"


HYBRID = {"tp": 2, "dp": 4, "zero": 3, "dp_replicate": 2}


@pytest.mark.parametrize(
    ("layout", "ranks", "becomes"),
    [
        (HYBRID, 2, "TP2·PP1·DP1·Z3"),
        (HYBRID, 4, "TP2·PP1·DP2·Z3"),
        (HYBRID, 16, "TP2·PP1·DP8·Z3·HSDP2×4"),
        ({"dp": 8, "zero": 3, "dp_replicate": 2}, 4, "TP1·PP1·DP4·Z3"),
        ({"dp": 8, "zero": 3, "dp_replicate": 2}, 6, "TP1·PP1·DP6·Z3"),
        ({"dp": 8, "zero": 1, "dp_replicate": 2}, 4, "TP1·PP1·DP4·Z1"),
        ({"dp": 8, "zero": 1, "dp_replicate": 2}, 16, "TP1·PP1·DP16·Z1·HSDP2×8"),
    ],
)
def test_hybrid_sharding_keeps_its_copies_only_where_no_rank_holds_more(
    layout: dict[str, object], ranks: int, becomes: str
) -> None:
    before = job(8, layout, training={"backend": "fsdp", "global_batch": 48, "micro_batch": 1})
    assert resized(before, Cluster(accelerators_per_node=ranks)).training.layout.label == becomes


@given(st.integers(1, 12), st.sampled_from([HYBRID, {"dp": 8, "zero": 1, "dp_replicate": 4}]))
def test_no_copy_is_left_on_a_single_rank(ranks: int, layout: dict[str, object]) -> None:
    before = job(8, layout, training={"backend": "fsdp", "micro_batch": 1})
    found = resized(before, Cluster(accelerators_per_node=ranks)).training.layout
    assert found.dp_replicate == 1 or found.dp_shard > 1


@pytest.mark.parametrize(
    ("backend", "zero", "becomes"),
    [("deepspeed", 3, "TP1·PP1·DP8·Z3"), ("deepspeed", 1, "TP1·PP1·DP8·Z1"), ("megatron", 1, "TP1·PP1·DP8·Z1")],
)
def test_a_backend_without_hybrid_sharding_shares_out_over_all_replicas(backend: str, zero: int, becomes: str) -> None:
    layout = {"dp": 8, "zero": zero, "dp_replicate": 2}
    before = job(8, layout, training={"backend": "fsdp", "precision": "bf16", "micro_batch": 1})
    assert resized(before, before.cluster, backend).training.layout.label == becomes


@pytest.mark.parametrize(("backend", "becomes"), [("deepspeed", "TP1·PP1·DP4·Z3·offload"), ("fsdp", "TP1·PP1·DP4·Z3")])
def test_an_offloaded_optimizer_stays_offloaded_if_the_backend_can(backend: str, becomes: str) -> None:
    layout = {"dp": 8, "zero": 3, "offload_optimizer": True}
    before = job(8, layout, training={"backend": "deepspeed", "micro_batch": 1})
    assert resized(before, Cluster(accelerators_per_node=4), backend).training.layout.label == becomes


def test_the_fastest_known_one_wins() -> None:
    current = Configuration(layout=Layout(dp=4), micro_batch=2, global_batch=8)
    times = {(1, 2, 1): 2.0, (2, 1, 1): 1.0}

    def predict(configuration: Configuration) -> Prediction | None:
        layout = configuration.layout
        seconds = times.get((layout.tp, layout.pp, layout.dp))
        return seconds and Prediction(step_seconds=seconds, source="measured")

    found = fitting(current, job(), Cluster(accelerators_per_node=2), predict)
    assert found.layout == Layout(tp=2)


def test_what_ran_out_of_memory_is_not_chosen() -> None:
    current = Configuration(layout=Layout(dp=4), micro_batch=2, global_batch=8)

    def predict(configuration: Configuration) -> Prediction | None:
        return Prediction(source="measured", failure="out of memory") if configuration.layout.dp > 1 else None

    found = fitting(current, job(), Cluster(accelerators_per_node=2), predict)
    assert found.layout.dp == 1


def test_found_ranks_become_a_cluster() -> None:
    planned = Cluster(nodes=2, accelerators_per_node=8, accelerator="h100")
    assert found_cluster(planned, 16, 8) == planned
    assert found_cluster(planned, 8, 8) == Cluster(nodes=1, accelerators_per_node=8, accelerator="h100")
    assert found_cluster(planned, 12, 8).accelerators == 12


def test_set_cluster_chooses_a_layout_and_a_layout_that_is_named_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(dump_job(job(4)))
    smaller = load_resized(path, ["cluster.accelerators_per_node=2", "training.lr=0.01"])
    assert smaller.training.layout == Layout(dp=2)
    assert smaller.training.lr == 0.01
    named = load_resized(path, ["cluster.accelerators_per_node=2", "training.layout={tp: 2}"])
    assert named.training.layout == Layout(tp=2)
    assert load_resized(path, []) == job(4)
    with pytest.raises(JobError, match=r"cluster.accelerators_per_node: .*got 'many'"):
        load_resized(path, ["cluster.accelerators_per_node=many"])
    with pytest.raises(JobError, match=r"training\.layout"):
        load_resized(path, ["cluster.accelerators_per_node=2", "training.layout={tp: 4}"])


def test_another_backend_runs_the_layout_or_one_whose_ranks_hold_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy has tensor parallelism and ZeRO 1, and no pipelines."""
    monkeypatch.setitem(registry.BUILT_IN, "toy", "tests.toy_backend:ToyDescription")
    path = tmp_path / "job.yaml"
    path.write_text(
        dump_job(job(4, {"tp": 2, "pp": 2, "zero": 1}, planner={"layouts": [{"tp": 2, "pp": 2}, {"dp": 4}]}))
    )
    there = load_resized(path, ["training.backend=toy", "planner.max_micro_batch=4"])
    assert there.training.backend == "toy"
    assert there.training.layout == Layout(dp=4), "the job file's layouts are all that may be chosen"
    assert there.planner.layouts == [Layout(dp=4)]
    assert (there.training.global_batch, there.reference_batch, there.planner.max_micro_batch) == (8, 8, 4)
    path.write_text(dump_job(job(4, {"tp": 2, "pp": 2, "zero": 1})))
    assert load_resized(path, ["training.backend=toy"]).training.layout == Layout(tp=4, zero=1)
    named = load_resized(path, ["training.backend=toy", "planner.layouts=[{tp: 2, dp: 2}]"])
    assert named.planner.layouts == [Layout(tp=2, dp=2)]
    path.write_text(dump_job(job(4, {"tp": 2, "dp": 2})))
    assert load_resized(path, ["training.backend=toy"]).training.layout == Layout(tp=2, dp=2)


def test_a_backend_that_cannot_run_the_job_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "toy", "tests.toy_backend:ToyDescription")
    path = tmp_path / "job.yaml"
    path.write_text(dump_job(job(4)))
    with pytest.raises(JobError, match=r"training.backend: no backend 'other' is installed"):
        load_resized(path, ["training.backend=other"])
    with pytest.raises(JobError, match=r"training.layout: .*pp\(2\)|training: pp\(2\) is not supported by the toy"):
        load_resized(path, ["training.backend=toy", "training.layout={pp: 2, dp: 2}"])
