"""`copus plan`: what to expect of a job, on a machine that has none of its accelerators."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from launch_jobs import copus_here
from test_cli import HEAVY, imported

from copus.backends.registry import BUILT_IN, find_backend
from copus.estimate import estimate_of
from copus.job import load_job
from launch.plan import as_values
from planner.job_estimate import JobEstimate, estimate_job, rows_of
from planner.memory_check import in_words
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.hardware import is_hardware_of, name_hardware
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.table import ThroughputTable

JOB = {
    "name": "eight-billion",
    "model": {
        **{"layers": 32, "hidden": 4096, "ffn_hidden": 14336, "heads": 32, "kv_heads": 8, "seq_len": 4096},
        "vocab": 128256,
    },
    "cluster": {"nodes": 2, "accelerators_per_node": 8, "accelerator": "h100-sxm"},
    "training": {
        "layout": {"tp": 4, "dp": 4, "sequence_parallel": True, "zero": 1},
        "global_batch": 32,
        "tokens": 1_000_000,
        "precision": "bf16",
    },
    "planner": {"min_global_batch": 16, "max_global_batch": 128, "max_micro_batch": 4},
}


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"profile": {"table": str(tmp_path / "table.jsonl")}}))
    return path


def add_row(
    path: Path, configuration: Configuration, hardware: str = "2 nodes × 8 × NVIDIA H100 80GB HBM3", **values: object
) -> None:
    job = load_job(path)
    fingerprint = Fingerprint(
        model=job.model.digest,
        precision="bf16",
        backend=str(values.pop("backend", "b")),
        hardware=hardware,
        software=str(values.pop("software", "s")),
    )
    common = {"fingerprint": fingerprint, "model": job.model, "configuration": configuration, "time": 1.0}
    ThroughputTable(job.profile.table).add(Measurement(**(common | {"spread_seconds": 0.1, "count": 3} | values)))


def estimated(path: Path, overrides: Sequence[str] = ()) -> JobEstimate:
    job = load_job(path, list(overrides))
    rows = ThroughputTable(job.profile.table).rows()
    training = job.training
    start, backend = training.configuration, find_backend("megatron")
    return estimate_job(job.planner, job.model, job.cluster, training.precision, start, rows, backend=backend)


def test_it_answers_without_torch_or_an_accelerator(job_file: Path) -> None:
    loaded = imported(job_file.parent, "plan", str(job_file), "--json")
    assert loaded.isdisjoint(set(HEAVY) - {"numpy"})
    assert "numpy" in loaded


def test_json_says_everything(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here("plan", str(job_file), "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["measured_rows"] == 0
    assert found["memory_bytes"] == pytest.approx(80 * 2**30, rel=0.01)
    assert [each["global_batch"] for each in found["fastest"]] == [16, 32, 64, 128]
    peak = found["start"]["mfu"] / found["start"]["samples_per_second"]
    for each in found["candidates"]:
        assert each["source"] == "predicted"
        assert sum(each["memory"].values()) == pytest.approx(each["peak_bytes"])
        assert 0.05 < each["mfu"] < 0.8
        assert each["mfu"] / each["samples_per_second"] == pytest.approx(peak, rel=1e-9)
        assert each["step_seconds_low"] < each["step_seconds"] < each["step_seconds_high"]
        assert each["fits"] in ("fits", "should fit", "may not fit", "does not fit")
    assert {each["fits"] for each in found["candidates"]} >= {"fits", "does not fit"}
    proposed = [each["best"] for each in (*found["fastest"], *found["by_noise"])]
    assert all(each["fits"] in ("fits", "should fit") for each in proposed)
    assert found["start"]["configuration"]["layout"]["tp"] == 4


def test_tables_for_people(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here("plan", str(job_file), "--all") == 0
    out = capsys.readouterr().out
    words = (
        "16 × h100-sxm, 80.0 GiB each",
        "; memory: ",
        "samples/s (80 %: ",
        "predicted",
        "MFU",
        "activations",
        "noise scale",
        "does not fit",
        "assumed:",
    )
    for text in words:
        assert text in out


def test_the_best_batch_grows_with_the_noise(job_file: Path) -> None:
    estimate, config = estimated(job_file), load_job(job_file).planner
    ranges = estimate.by_noise(config)
    batches = [each.best.configuration.global_batch for each in ranges]
    assert batches == sorted(batches)
    assert batches[0] == 16
    assert batches[-1] == 128
    assert (ranges[0].low, ranges[-1].high) == (0, math.inf)
    assert all(one.high == two.low for one, two in pairwise(ranges))


def test_the_fastest_is_the_fastest(job_file: Path) -> None:
    estimate = estimated(job_file)
    for each in estimate.fastest():
        same = [e for e in estimate.eligible if e.configuration.global_batch == each.best.configuration.global_batch]
        assert each.best.samples_per_second == max(e.samples_per_second or 0 for e in same)
        assert each.runner_up is not None
        assert each.runner_up.configuration.layout != each.best.configuration.layout
        assert 0.5 <= (each.sure or 0) <= 1


def test_it_ends_with_the_start_that_the_job_would_choose_and_what_the_run_costs_there(
    job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copus_here("plan", str(job_file), "--json", "--price", "2") == 0
    recommended = json.loads(capsys.readouterr().out)["recommended"]
    job = load_job(job_file)
    at_first = job.total_samples * job.model.seq_len / recommended["tokens_per_second"]
    assert recommended["run_seconds"] <= at_first * (1 + 1e-12), "later batches are larger, and no slower"
    hours = recommended["run_seconds"] / 3600 * job.cluster.accelerators
    assert (recommended["accelerator_hours"], recommended["price"]) == pytest.approx((hours, 2 * hours))
    assert copus_here("plan", str(job_file)) == 0
    *_, last = capsys.readouterr().out.strip().splitlines()
    pasted = yaml.safe_load(last.partition("job file")[2].strip())["training"]
    overrides = [f"training.{name}={json.dumps(value)}" for name, value in pasted.items()]
    assert load_job(job_file, overrides).training.configuration.label == recommended["label"]
    assert copus_here("plan", str(job_file), "--price", "-1") == 2
    assert capsys.readouterr().err.startswith("copus: --price(-1.0): expected the price of an accelerator-hour")


def test_what_was_measured_takes_precedence(job_file: Path) -> None:
    layout = Layout(tp=8, dp=2, sequence_parallel=True, zero=1)
    fast = Configuration(layout=layout, micro_batch=1, global_batch=16)
    add_row(job_file, fast, step_seconds=0.01, peak_bytes=2**30, spread_seconds=0.001)
    estimate = estimated(job_file)
    (best, *_) = estimate.fastest()
    assert best.best.configuration == fast
    assert best.best.source == "measured"
    assert (best.best.step_seconds, best.best.step_seconds_low) == (
        0.01,
        pytest.approx(0.01 * 1.1 ** -(5**-0.5), rel=0.01),
    )
    assert best.best.peak.expected_bytes == 2**30
    assert estimate.measured_rows == 1
    others = {each.source for each in estimate.candidates if each.configuration != fast}
    assert others == {"predicted"}


def test_what_failed_is_not_proposed(job_file: Path) -> None:
    first = estimated(job_file).fastest()[0].best.configuration
    add_row(job_file, first, failure="out of memory", spread_seconds=None, count=0)
    estimate = estimated(job_file)
    failed = next(each for each in estimate.candidates if each.configuration == first)
    assert failed.refusal == "out of memory"
    assert estimate.fastest()[0].best.configuration != first


def test_the_start_with_other_settings(job_file: Path) -> None:
    estimate = estimated(job_file)
    by = {
        (e.configuration.layout.recompute, e.configuration.layout.zero, e.configuration.layout.sequence_parallel): e
        for e in estimate.variants
    }
    assert len(by) == len(estimate.variants) == 3 * 2 * 2
    assert by["none", 1, True] == estimate.start
    assert (
        by["full", 1, True].peak.expected_bytes
        < by["none", 1, True].peak.expected_bytes
        < by["none", 0, True].peak.expected_bytes
    )
    assert (by["full", 1, True].step_seconds or 0) > (by["none", 1, True].step_seconds or 0)


@pytest.mark.parametrize(
    ("backend", "layout", "precision", "labels"),
    [
        ("deepspeed", "{dp: 16, zero: 1}", "bf16", {"Z1", "Z2", "Z3"}),
        ("deepspeed", "{dp: 16, zero: 1}", "fp32", {"DP16", "Z1", "Z2", "Z3"}),
        ("fsdp", "{dp: 16, zero: 3, dp_replicate: 2}", "bf16", {"DP16", *(f"Z{zero}·HSDP2×8" for zero in (1, 2, 3))}),
    ],
)
def test_variants_are_ones_that_the_job_takes(
    job_file: Path, backend: str, layout: str, precision: str, labels: set[str]
) -> None:
    settings = [f"training.{each}" for each in (f"backend={backend}", f"layout={layout}", f"precision={precision}")]
    layouts = [each.configuration.layout for each in estimate_of(load_job(job_file, settings)).variants]
    plain = {each.label.removeprefix("TP1·PP1·DP16·") for each in layouts if each.recompute == "none"}
    assert {label.removeprefix("TP1·PP1·") for label in plain} == labels
    for each in layouts:
        assert load_job(job_file, [*settings, f"training.layout={each.model_dump_json()}"]).training.layout == each


def test_rows_of_other_jobs_do_not_count(job_file: Path) -> None:
    job = load_job(job_file)
    start = job.training.configuration
    add_row(job_file, start, hardware="8 × NVIDIA H100", step_seconds=1.0)
    add_row(job_file, start, hardware="16 × NVIDIA H100", step_seconds=1.0)
    add_row(job_file, start, hardware="2 nodes × 8 × Intel Xeon core", step_seconds=1.0)
    add_row(job_file, start, hardware="2 nodes × 8 × NVIDIA H200", step_seconds=1.0, time=9.0)
    add_row(job_file, start, software="old", step_seconds=3.0)
    add_row(job_file, start, software="new", step_seconds=2.0, time=2.0)
    rows = rows_of(ThroughputTable(job.profile.table).rows(), job.model, job.cluster, "bf16")
    assert [row.step_seconds for row in rows] == [2.0]
    assert rows_of(rows, job.model, job.cluster, "fp32") == []


def test_imported_rows_count_only_where_there_are_no_others(job_file: Path) -> None:
    job = load_job(job_file)
    start, table = job.training.configuration, ThroughputTable(job.profile.table)

    def seconds() -> list[float | None]:
        rows = rows_of(table.rows(), job.model, job.cluster, "bf16", find_backend("megatron"))
        return [row.step_seconds for row in rows]

    add_row(job_file, start, step_seconds=1.0, time=9.0)
    assert seconds() == [1.0]
    add_row(job_file, start, step_seconds=2.0, backend="megatron-core 0.16.1")
    assert seconds() == [2.0]


def test_rows_of_another_backend_of_copus_are_not_imported_ones(
    job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = load_job(job_file).training.configuration
    add_row(job_file, start, step_seconds=1.0, backend="torch 2.13.0")
    assert estimate_of(load_job(job_file)).measured_rows == 1
    monkeypatch.setitem(BUILT_IN, "toy", "tests.toy_backend:ToyDescription")
    assert estimate_of(load_job(job_file)).measured_rows == 0


@pytest.mark.parametrize(
    ("accelerator", "yes", "no"),
    [
        (
            "a100-80g",
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100", "A100_80GB"),
            ("NVIDIA A100-SXM4-40GB", "NVIDIA A10", "A100 40GiB"),
        ),
        (
            "h100-sxm",
            ("NVIDIA H100 80GB HBM3", "dgx-h100", "H100_SXM", "8xH100"),
            ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH100"),
        ),
        ("b200", ("NVIDIA B200",), ("NVIDIA GB200", "NVIDIA B300")),
        ("h200", ("NVIDIA H200",), ("NVIDIA GH200 480GB",)),
        ("mi250", ("AMD Instinct MI250X / MI250",), ("AMD Instinct MI210",)),
        ("cpu", ("AMD EPYC core",), ("NVIDIA H100 80GB HBM3",)),
    ],
)
def test_accelerators_by_what_they_call_themselves(accelerator: str, yes: tuple[str, ...], no: tuple[str, ...]) -> None:
    cluster = Cluster(nodes=2, accelerators_per_node=8, accelerator=accelerator)
    assert [is_hardware_of(name_hardware(device, 2, 8), cluster) for device in (*yes, *no)] == [
        *(True for _ in yes),
        *(False for _ in no),
    ]
    for nodes, per_node in ((1, 16), (1, 8), (4, 4), (2, 16)):
        assert not is_hardware_of(name_hardware(yes[0], nodes, per_node), cluster)


def test_rows_of_other_settings_do_not_count(job_file: Path) -> None:
    start = load_job(job_file).training.configuration
    own = {"backend": "megatron-core 0.16.1"}
    add_row(job_file, start, step_seconds=1.0, software="torch 2", **own)
    add_row(job_file, start, step_seconds=2.0, software="torch 2, dropout", time=9.0, **own)
    seen = [estimate_of(load_job(job_file, changes)).start.step_seconds for changes in ([], ["training.dropout=0.1"])]
    assert seen == [1.0, 2.0]


def test_every_row_is_timed_as_the_job_runs_it(job_file: Path) -> None:
    """Recomputation takes time, whether or not a lone micro-batch is halved for its noise."""
    alone = ["training.layout={tp: 8, pp: 2}", "training.micro_batch=8", "training.global_batch=8"]
    for every in (1, 1000):
        estimate = estimated(
            job_file,
            [
                *alone,
                f"planner.noise_halve_every_steps={every}",
                "planner.noise_every_steps=1",
                "planner.noise_source=microbatch",
            ],
        )
        seconds = {
            each.configuration.layout.recompute: each.step_seconds or 0.0
            for each in estimate.variants
            if (each.configuration.layout.zero, each.configuration.layout.sequence_parallel) == (0, False)
        }
        assert seconds["none"] < seconds["selective"] < seconds["full"]
        assert any("a lone micro-batch is timed as the job runs it" in each for each in estimate.predictor.assumptions)


def test_dropout_takes_memory(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = []
    for share in (0.0, 0.1):
        assert copus_here("plan", str(job_file), "--json", "--set", f"training.dropout={share}") == 0
        told = json.loads(capsys.readouterr().out)
        peaks.append(told["start"]["peak_bytes"])
        assert any(("with" if share else "no") + " dropout" in each for each in told["assumptions"])
    assert peaks[0] < peaks[1]


def test_a_deeper_pipeline_than_was_measured_is_left_to_the_memory_model(job_file: Path) -> None:
    changes = ["training.layout={tp: 2, pp: 8}", "training.global_batch=32", "training.micro_batch=4"]
    changes += ["planner.min_global_batch=4", "planner.max_vp=1"]
    start = load_job(job_file, changes).training.configuration
    for batch in (4, 8):
        add_row(
            job_file, start.model_copy(update={"global_batch": batch}), step_seconds=batch / 8, peak_bytes=30 * 2**30
        )
    by_batch = {
        each.configuration.global_batch: each
        for each in estimated(job_file, changes).candidates
        if (each.configuration.layout, each.configuration.micro_batch) == (start.layout, 4)
    }
    assert by_batch[8].source == "measured"
    assert (by_batch[8].peak.chance_to_fit, by_batch[8].peak.expected_bytes) == (1.0, 30 * 2**30)
    deeper = by_batch[32]
    assert deeper.source == "interpolated"
    assert deeper.peak.chance_to_fit != 1.0
    assert deeper.peak.expected_bytes > 30 * 2**30


def test_a_job_that_fits_nowhere_says_so(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["model.layers=320", "training.global_batch=32"]
    assert copus_here("plan", str(job_file), *(part for change in changes for part in ("--set", change))) == 0
    out = capsys.readouterr().out
    assert "No candidate may be chosen: the smallest is" in out


def test_on_cpu_cores_memory_is_not_checked(job_file: Path) -> None:
    job = load_job(job_file, ["cluster.accelerator=cpu", "training.precision=fp32"])
    training = job.training
    estimate = estimate_job(job.planner, job.model, job.cluster, training.precision, training.configuration)
    values = as_values(job, estimate)
    assert values["memory_bytes"] is None
    assert {each["fits"] for each in values["candidates"]} == {"not checked"}
    assert {each["mfu"] for each in values["candidates"]} == {None}  # nobody rates a core


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("cluster.accelerator=abacus", "cluster.accelerator(abacus) is unknown"),
        ("training.layout={tp: 3, dp: 4}", "≠ 16 accelerators"),
        ("profile.table=/proc/self", "profile.table"),
    ],
)
def test_errors_are_one_line(job_file: Path, change: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here("plan", str(job_file), "--set", change) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert named in err


def test_words() -> None:
    assert [in_words(chance) for chance in (None, 0.01, 0.3, 0.9, 0.99)] == [
        "not checked",
        "does not fit",
        "may not fit",
        "should fit",
        "fits",
    ]
