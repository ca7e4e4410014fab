"""The throughput benchmark reads published rows as they are, and its scores are what they say."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import planner_speed, throughput, throughput_smoothness
from benchmarks.published import read
from benchmarks.published_sources import dispatch_of, family_of, features_of, implementation_of, stack_of
from benchmarks.throughput_intervals import (
    GROUPS,
    Rows,
    blind_spreads,
    covered,
    expected_coverages,
    pooled,
    scale_of,
)
from benchmarks.throughput_priors import BETWEEN, Tuner, write
from profiles.cost import CostModel
from profiles.cost.constants import CONSTANTS
from profiles.cost.effects import GROUPS as GROUPS_OF_EFFECTS
from profiles.cost.effects import Effects
from profiles.cost.errors import Errors
from profiles.cost.residual import COORDINATES, Smoothness

STACK = "fsdp"
SHAPE = {"layers": 12, "hidden": 1024, "ffn_hidden": 4096, "gated_mlp": "no", "heads": 16, "kv_heads": 16}
BASE = {"source_id": "lab", "sweep_id": "lab-8g", "system": "dgx a100-sxm-80g", "gpus": 8, "gpus_per_node": 8}
BASE |= {"precision": "bf16", "seq_len": 1024, "vocab": 50257, "tied_embeddings": "", "grad_accum": "", "vp": ""}
BASE |= {"cp": 1, "ep": "", "sequence_parallel": "no", "recompute": "full", "sharding": "fsdp zero1", "quality": "ok"}
BASE |= {"tokens_per_s_per_gpu": "", "mfu": ""} | SHAPE


def folder_of(rows: list[dict[str, object]], at: Path) -> Path:
    """A folder with these rows as `throughput.csv`."""
    with (at / "throughput.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*BASE, "model_name", "tp", "pp", "dp", "mbs", "gbs", "step_time_s"])
        writer.writeheader()
        writer.writerows(rows)
    return at


def sweep() -> list[dict[str, object]]:
    """Layouts of eight accelerators, one second each."""
    rows: list[dict[str, object]] = []
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4):
            for mbs in (1, 2, 4):
                dp = 8 // (tp * pp)
                if dp and 64 % (dp * mbs) == 0:
                    rows.append(BASE | {"tp": tp, "pp": pp, "dp": dp, "mbs": mbs, "gbs": 64, "step_time_s": 1.0})
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep whose times are the model's, 20 % slower; then one bad row and seven that cannot be used."""
    rows = sweep()
    timings = read(folder_of(rows, tmp_path)).sweeps[0].timings
    seconds = (
        1.2 * CostModel(stack=STACK).predict(timings.model, timings.cluster, timings.configurations, "bf16").seconds
    )
    rows = [row | {"step_time_s": float(t)} for row, t in zip(rows, seconds, strict=True)]
    rows.append(rows[0] | {"step_time_s": 999.0, "quality": "near-oom(>=74GB)", "mbs": 8})
    rows += [rows[0] | {"hidden": ""}, rows[0] | {"gbs": 7, "dp": 8}, rows[0] | {"step_time_s": ""}]
    rows += [rows[0] | {"mbs": "some"}, rows[0] | {"precision": "int3"}, rows[0] | {"system": "abacus"}]
    rows.append(rows[0] | {"tp": 0})
    return folder_of(rows, tmp_path)


def test_rows_are_read_or_counted(folder: Path) -> None:
    published = read(folder)
    (found,) = published.sweeps
    assert published.rows == len(sweep()) + 8
    assert dict(published.skipped) == {
        "configuration: global_batch ÷ (dp × micro_batch), not a whole number of micro-batches": 1,
        **{"hidden is empty": 1, "no time": 1, "mbs is not a number": 1},
        **{"precision is unknown": 1, "accelerator is unknown": 1, "a degree of parallelism is below 1": 1},
    }
    assert found.scored.tolist() == [True] * len(sweep()) + [False]
    assert found.timings.cluster.accelerator == "a100-80g"
    assert (found.timings.configurations.zero == 1).all()
    assert (found.timings.configurations.vp == 1).all()


def test_a_mixture_of_experts_has_its_shape_from_beside_the_rows(tmp_path: Path) -> None:
    shape = {"name": "Tiny-MoE", "layers": 4, "hidden": 256, "ffn_hidden": 1024, "first_k_dense": 1, "mtp_layers": 1}
    shape |= {"moe_ffn_hidden": 128, "experts": 8, "experts_per_token": 2, "shared_expert_ffn_hidden": 128}
    shape |= {"heads": 4, "kv_heads": 4, "head_dim": 64, "vocab": 1000, "gated_mlp": True, "tied_embeddings": False}
    shape |= {"attention": {"kind": "GQA"}, "mamba": None}
    (tmp_path / "model_shapes.json").write_text(json.dumps({"models": {"tiny": shape}}))
    row = BASE | {"source_id": "megatron-bridge", "model_name": "tiny", "layers": "", "hidden": "", "heads": ""}
    row |= {"tp": 2, "pp": 1, "dp": 4, "ep": 8, "mbs": 1, "gbs": 8, "step_time_s": 1.0, "sequence_parallel": ""}
    row |= {"recompute": "selective (norm, moe_act)", "sharding": ""}
    (found,) = read(folder_of([row], tmp_path)).sweeps
    assert (found.kind, found.stack) == ("experts", "megatron-te")
    model, configuration = found.timings.model, found.timings.configurations[0]
    assert (model.layers, model.dense_layers, model.expert_width, model.experts) == (5, 1, 128, 8)
    layout = configuration.layout
    assert (layout.ep, layout.etp) == (8, 1), "recipes of Megatron-Bridge split no expert"
    assert layout.sequence_parallel
    assert (layout.zero, layout.recompute) == (1, "none"), "norms and activations are next to nothing"


@pytest.mark.parametrize(
    ("source", "sharding", "stack"),
    [
        ("ultrascale-tp", "zero0", "nanotron"),
        ("megatron-sc21-t2", "none", "megatron"),
        ("megatron-sc21-t2", "zero3", "deepspeed"),
        ("dgxc", "", "megatron-te"),
        ("somebody", "fsdp2 (zero3)", "fsdp"),
        ("somebody", "zero3 + optimizer offload", "deepspeed"),
        ("somebody", "", None),
    ],
)
def test_the_software_of_a_row_is_told_by_its_source_or_its_sharding(
    source: str, sharding: str, stack: str | None
) -> None:
    assert stack_of({"source_id": source, "sharding": sharding}) == stack


def test_sources_that_repeat_each_other_are_left_out_together() -> None:
    assert family_of("megatron-bridge-cards") == family_of("megatron-bridge")
    assert family_of("mcore-moe-report") == family_of("megatron-moe-modelzoo") != family_of("megatron-bridge")
    assert family_of("somebody") == "somebody"


def test_scores_are_what_they_say(folder: Path) -> None:
    result = throughput.run(read(folder), in_use=True)
    (line,) = result["sweeps"]
    assert line["rows"] == len(sweep())
    assert line["fitted_rows"] == 4
    assert line["zero_shot_mape_pct"] == pytest.approx(100 * (1 - 1 / 1.2), abs=1e-6)
    assert line["zero_shot_regret_pct"] == 0
    assert line["mape_pct"] < 5
    assert line["nearest_mape_pct"] > line["mape_pct"]
    assert line["mape_with_unreliable_pct"] > line["mape_pct"]
    assert {"sweep_id", "nodes", "regret_pct", "coverage_pct", "roofline_mape_pct"} <= set(line)


def test_regret_is_the_time_lost_by_the_choice(folder: Path) -> None:
    timings = read(folder).sweeps[0].timings.take(np.arange(3))
    seen = np.array([1.0, 2.0, 3.0])
    timings = type(timings)(timings.model, timings.cluster, "bf16", timings.configurations, seen)
    assert throughput.regrets(np.array([5.0, 4.0, 6.0]), timings).tolist() == [1.0]
    assert throughput.regrets(seen, timings).tolist() == [0.0]
    nothing = np.full(3, np.nan)
    assert throughput.regrets(np.array([2.0, 2.0, 3.0]), timings, nothing).tolist() == [0.5], "equals share the choice"
    measured = np.array([np.nan, 2.0, np.nan])
    assert throughput.regrets(np.array([3.0, 4.0, 2.5]), timings, measured).tolist() == [1.0], (
        "what was measured counts"
    )
    may = np.array([False, False, True])
    assert throughput.regrets(seen, timings, nothing, may).tolist() == [2.0], "what may not fit is not chosen"
    assert throughput.regrets(seen, timings, measured, may).tolist() == [1.0], "what ran fits"
    assert throughput.regrets(seen, timings, nothing, ~may & may).tolist() == [0.0]


def test_it_prints_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--data", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["benchmark"], result["left_out"]) == ("throughput", True)
    assert result["kinds"]["dense"]["all"]["sources"] == 1
    with pytest.raises(SystemExit):
        throughput.main(["--data", str(folder / "nowhere")])


def test_the_whole_space_is_planned() -> None:
    found, predicted = planner_speed.plan(CostModel())
    assert len(found) == len(predicted.seconds) > 10_000
    assert np.isfinite(predicted.seconds).all()
    assert (found.accelerators == planner_speed.CLUSTER.accelerators).all()


def test_medians_follow_the_rows_but_not_those_left_out(folder: Path) -> None:
    tuner = Tuner(read(folder).sweeps)
    tuned, untouched = tuner.tune(), tuner.tune("lab")
    assert tuner.mapes(tuned)[0] < tuner.mapes(Effects())[0] / 1.5
    assert untouched.constants == pytest.approx({name: c.mean for name, c in CONSTANTS.items()}, rel=1e-4)
    assert untouched.levels == {group: {} for group in GROUPS_OF_EFFECTS}, "of what no row is from nothing is said"


@pytest.mark.parametrize(
    ("notes", "features"),
    [
        ("DeepEP; recompute cell empty; natural routing", ()),
        ("forced balance; EP overlap True; cuda graph none", ("even-routing", "expert-overlap")),
        ("EP overlap False; cuda graph local full_iteration", ("iteration-graph",)),
        (
            "HybridEP, TE graphs router+preprocess, EP overlap off, benchmark mode with balanced gate",
            ("even-routing", "graphs"),
        ),
        ("no graphs, a2a overlap", ("expert-overlap",)),
    ],
)
def test_what_a_recipe_switches_on_is_read_from_its_notes(notes: str, features: tuple[str, ...]) -> None:
    row = {"source_id": "lab", "notes": notes}
    assert features_of(row) == features
    assert features_of(row | {"graphs": "full_iteration", "overlap": "True", "notes": ""}) == (
        "iteration-graph",
        "expert-overlap",
    )


@pytest.mark.parametrize(
    ("row", "dispatch"),
    [
        ({"notes": "DeepEP, 1F1B all-to-all overlap"}, "flex"),
        ({"notes": "forced balance; dispatcher hybridep; EP overlap True"}, "flex"),
        ({"notes": "table 3, method MCore"}, "alltoall"),
        ({"source_id": "megatron-bridge", "dispatcher": ""}, "alltoall"),
        ({"source_id": "megatron-bridge", "dispatcher": "deepep"}, "flex"),
        ({"source_id": "megatron-bridge-cards", "notes": "pretrain; natural routing; recipe m_config"}, "alltoall"),
        ({"source_id": "megatron-bridge-cards", "notes": "GB200; forced balance; recipe m_config"}, "flex"),
        ({"source_id": "megatron-moe-modelzoo", "notes": "all-to-all dispatcher; forced routing balance"}, "alltoall"),
        ({"source_id": "megatron-moe-modelzoo", "notes": "VPP not stated in this revision"}, "flex"),
    ],
)
def test_how_tokens_came_to_experts_is_read_from_recipe_and_notes(row: dict[str, str], dispatch: str) -> None:
    assert dispatch_of({"source_id": "lab"} | row) == dispatch


def test_memory_follows_the_recipe() -> None:
    row = {
        "source_id": "lab",
        "model_name": "m",
        "notes": "optimizer moments bf16; EP overlap True",
        "modules": "selective (mla_up_proj, mlp, layernorm)",
    }
    how = implementation_of(row)
    assert how.optimizer.bytes_of_number == 2
    assert how.recomputed_modules == ("latent", "norms")
    assert how.fp32_gradients
    bridge = {"source_id": "megatron-bridge", "model_name": "Qwen3", "modules": "none"}
    assert implementation_of(bridge).optimizer.bytes_of_number == 4
    assert not implementation_of(bridge).fp32_gradients


def test_what_differs_between_two_stacks_is_taken_for_theirs(tmp_path: Path) -> None:
    rows = [row | {"source_id": name, "sharding": f"{name} zero1"} for name in ("fsdp", "zero1") for row in sweep()]
    sweeps = read(folder_of(rows, tmp_path)).sweeps
    for one, factor in zip(sweeps, (0.8, 1.25), strict=True):
        t = one.timings
        seconds = factor * CostModel(effects=Effects()).predict(t.model, t.cluster, t.configurations, "bf16").seconds
        one.timings = replace(t, step_seconds=seconds)
    effects = Tuner(sweeps).tune()
    fast, slow = (effects.levels["stack"][name]["products"] for name in ("fsdp", "deepspeed"))
    assert fast.multiplier < 1 < slow.multiplier
    assert fast.log_sd < BETWEEN["stack"]["products"], "rows of it make it better known than a stack never seen"
    written = tmp_path / "effects.yaml"
    write(effects, written)
    groups = yaml.safe_load(written.read_text())
    assert groups["stack"]["fsdp"]["products"] == pytest.approx(list(fast), rel=0.01)
    assert groups["constants"]["products"] == pytest.approx(effects.constants["products"], rel=0.01)


def test_widths_are_what_the_sources_ask_for_each_counting_the_same() -> None:
    rng = np.random.default_rng(0)
    sd_of_a_half = 1 / 1.2816  # 80 % of a normal distribution lie within 1.28 standard deviations

    def rows(size: float, count: int) -> Rows:
        return Rows(np.abs(size * sd_of_a_half * rng.standard_normal(count)), np.zeros(count))

    assert scale_of([rows(0.5, 20_000)]) == pytest.approx(0.5, abs=0.02)
    many, few = rows(0.3, 50_000), rows(1.2, 2_000)
    assert 0.5 < scale_of([many, few]) < 1.2
    assert covered(many, 0.3) == pytest.approx(0.8, abs=0.01)


def test_rows_that_err_alike_are_covered_all_or_not_at_all() -> None:
    rows, how = 200, Smoothness(freedom=1e6)
    far_apart = np.repeat(100.0 * np.arange(rows)[:, None], len(COORDINATES), axis=1)
    moves = np.zeros((rows, 3))
    apart = expected_coverages([Errors(how, moves, far_apart, 1.0, how.freedom)])
    assert np.abs(apart - 0.8).max() < 0.12
    alike = expected_coverages([Errors(how, moves + np.array([9.0, 0.0, 0.0]), far_apart, 1.0, how.freedom)])
    assert alike.mean() == pytest.approx(0.8, abs=0.06)
    assert ((alike < 0.1) | (alike > 0.9)).mean() > 0.95


def test_a_mean_over_sources_is_as_sure_as_the_families_are_many() -> None:
    shares = 100.0 * (np.arange(40) % 5 > 0)  # 80 % of the sources are covered
    apart = pooled(shares.tolist(), [str(source) for source in range(40)])
    assert apart["mean"] == pytest.approx(80)
    # Of a binomial share: 1.645 · √(0.8 · 0.2 ÷ 40) = 10.4 %.
    assert apart["low"] == pytest.approx(80 - 10.4, abs=2)
    assert apart["high"] == pytest.approx(80 + 10.4, abs=2.5)
    alike = pooled(np.sort(shares).tolist(), [str(source // 8) for source in range(40)])
    assert alike["mean"] == pytest.approx(80)
    assert alike["low"] < apart["low"]  # five families of eight sources that are alike: 1 ÷ 5 of the information
    assert pooled([70.0, 70.0], ["one", "one"]) == pytest.approx({"mean": 70, "low": 70, "high": 70})


def test_widths_are_found_for_clusters_that_there_are(folder: Path) -> None:
    found = blind_spreads(read(folder).sweeps, Smoothness())
    assert found
    assert set(found) <= set(GROUPS.values())
    assert all(0.2 <= scale < 3 for scale in found.values())


def test_smooth_rows_have_small_misses_and_what_is_left_out_is_scored(folder: Path) -> None:
    found = throughput_smoothness.smoothness(read(folder).sweeps, rounds=1)
    assert found.shape_sd < Smoothness().shape_sd
    result = throughput_smoothness.run(read(folder), "lab")
    assert result["left_out"]["lab"]["fitted_sweeps"] == 1
