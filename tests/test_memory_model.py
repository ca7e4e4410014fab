"""The memory model's arithmetic: what splits, what adds up, what the paper says."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.layout import Layout
from profiles.memory import KORTHIKANTI, MEGATRON, MEGATRON_TE, PYTORCH, Implementation, MemoryModel
from profiles.memory.activations import layer_activations, layers_in_flight
from profiles.memory.components import stage_components
from profiles.memory.model import CHUNK
from profiles.memory.parameters import stage_weights
from profiles.memory.peaks import OUTSIDE_BYTES
from profiles.model_shape import ModelShape
from profiles.optimizer_state import OptimizerState

GIB = 2**30
SMALL = ModelShape(
    **{"layers": 16, "hidden": 1024, "ffn_hidden": 4096, "heads": 16, "kv_heads": 16, "seq_len": 1024, "vocab": 32000}
)
EVERY = (MEGATRON, PYTORCH, KORTHIKANTI, Implementation(gathered_inputs="kept"))


def degrees(*values: int) -> st.SearchStrategy[int]:
    return st.sampled_from(values)


@st.composite
def models(draw: st.DrawFn) -> ModelShape:
    heads = draw(degrees(8, 16, 32))
    experts = draw(degrees(0, 0, 8))
    return ModelShape(
        layers=draw(degrees(16, 32)),
        hidden=heads * draw(degrees(64, 128)),
        ffn_hidden=draw(degrees(1024, 4096, 14336)),
        heads=heads,
        kv_heads=draw(degrees(8, heads)),
        seq_len=draw(degrees(512, 4096)),
        vocab=draw(degrees(1000, 32000, 131072)),
        gated_mlp=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        experts=experts,
        experts_per_token=2 if experts else 1,
        shared_expert_hidden=draw(degrees(0, 2048)) if experts else 0,
        **draw(st.sampled_from([{}, {"dense_layers": 3, "expert_hidden": 512}])) if experts else {},
    )


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    tp, pp, dp = draw(degrees(1, 2, 4, 8)), draw(degrees(1, 2, 4, 8)), draw(degrees(1, 2, 4, 16))
    layout = Layout(
        tp=tp,
        pp=pp,
        vp=draw(degrees(1, 2)) if pp > 1 else 1,
        cp=draw(degrees(1, 2)),
        dp=dp,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        zero=draw(degrees(0, 1, 2, 3)),
    )
    micro_batch = draw(degrees(1, 2, 4))
    count = draw(degrees(1, 2, 32))
    return Configuration(layout=layout, micro_batch=micro_batch, global_batch=count * micro_batch * dp)


def predict(model: ModelShape, configuration: Configuration, how: Implementation = MEGATRON, precision: str = "bf16"):
    found = MemoryModel(how).predict(model, Configurations.of([configuration]), precision)
    return found.peak_bytes[0], {name: part[0] for name, part in found.breakdown.items()}, found


def on_stage(
    model: ModelShape, configuration: Configuration, last: bool = False, how: Implementation = MEGATRON
) -> dict[str, float]:
    found = stage_components(model, Configurations.of([configuration]), "bf16", how, "last" if last else "first")
    return {name: float(part[0]) for name, part in found.items()}


def changed(configuration: Configuration, **layout: object) -> Configuration:
    return configuration.model_copy(update={"layout": configuration.layout.model_copy(update=layout)})


def one(layout: dict[str, object] | None = None, micro_batch: int = 1, count: int = 1) -> Configuration:
    lay = Layout(**(layout or {}))
    return Configuration(layout=lay, micro_batch=micro_batch, global_batch=count * micro_batch * lay.dp)


everything = settings(max_examples=100, deadline=None)


@everything
@given(models(), configurations(), st.sampled_from(EVERY), st.sampled_from(["fp32", "bf16"]))
def test_parts_are_positive_and_add_up(model, configuration, how, precision) -> None:
    peak, parts, found = predict(model, configuration, how, precision)
    assert math.isclose(sum(parts.values()), peak, rel_tol=1e-12)
    assert min(parts.values()) >= 0
    assert parts["weights"] > 0
    assert found.low[0] < peak < found.high[0]


@everything
@given(models(), configurations())
def test_more_tensor_parallelism_takes_no_more_of_anything(model, configuration) -> None:
    wider = changed(configuration, tp=configuration.layout.tp * 2)
    for last in (False, True):
        before, after = (on_stage(model, c, last) for c in (configuration, wider))
        for name in ("weights", "gradients", "optimizer", "activations", "logits"):
            assert after[name] <= before[name] * (1 + 1e-12), name
    assert predict(model, wider)[0] <= predict(model, configuration)[0] * (1 + 1e-12)


@everything
@given(models(), configurations())
def test_more_pipeline_stages_hold_fewer_weights(model, configuration) -> None:
    """Of layers: an embedding stays whole. The activations of the first stage do not grow (1F1B)."""
    plain = changed(configuration, vp=1, ep=1)
    longer = changed(plain, pp=plain.layout.pp * 2)
    first = [stage_weights(model, Configurations.of([c]), MEGATRON, "first") for c in (plain, longer)]
    assert (first[1].dense + first[1].experts <= first[0].dense + first[0].experts).all()
    in_flight = [layers_in_flight(model, Configurations.of([c]), MEGATRON, "first")[0] for c in (plain, longer)]
    assert in_flight[1] <= max(in_flight[0], model.layers)


@everything
@given(models(), configurations())
def test_zero_shares_out_more_with_every_stage(model, configuration) -> None:
    stages = [on_stage(model, changed(configuration, zero=stage)) for stage in range(4)]
    for name in ("weights", "gradients", "optimizer"):
        amounts = [stage[name] for stage in stages]
        assert amounts == sorted(amounts, reverse=True)
    replicas = configuration.layout.dp * configuration.layout.cp
    assert stages[1]["optimizer"] * replicas == pytest.approx(stages[0]["optimizer"])
    assert stages[2]["gradients"] * replicas == pytest.approx(stages[0]["gradients"])
    assert stages[3]["weights"] * replicas == pytest.approx(stages[0]["weights"])


@everything
@given(models(), configurations())
def test_recomputing_keeps_less_and_sequence_parallelism_too(model, configuration) -> None:
    for how in (MEGATRON, KORTHIKANTI):
        kinds = [changed(configuration, recompute=kind) for kind in ("none", "selective", "full")]
        kept = [on_stage(model, kind, how=how) for kind in kinds]
        amounts = [parts["activations"] for parts in kept]
        assert amounts == sorted(amounts, reverse=True)
    if configuration.layout.tp > 1:
        split, whole = (on_stage(model, changed(configuration, sequence_parallel=on)) for on in (True, False))
        assert split["activations"] < whole["activations"]


@everything
@given(models(), configurations(), st.integers(2, 4))
def test_activations_are_proportional_to_the_micro_batch(model, configuration, times) -> None:
    larger = configuration.model_copy(
        update={"micro_batch": times * configuration.micro_batch, "global_batch": times * configuration.global_batch}
    )
    for last in (False, True):
        before, after = on_stage(model, configuration, last), on_stage(model, larger, last)
        assert after["activations"] == pytest.approx(times * before["activations"])
        assert after["logits"] == pytest.approx(times * before["logits"])
        assert after["weights"] == before["weights"]


@everything
@given(models())
def test_one_rank_holds_exactly_the_models_weights(model) -> None:
    parts = predict(model, one())[1]
    assert parts["weights"] == 2 * model.parameters
    assert parts["gradients"] == 4 * model.parameters
    assert parts["optimizer"] == 12 * model.parameters
    whole = predict(model, one(), precision="fp32")[1]
    assert whole["weights"] + whole["gradients"] + whole["optimizer"] == 16 * model.parameters


def test_ranks_with_whole_experts_hold_as_much_as_ranks_that_split_more_of_them() -> None:
    model = SMALL.model_copy(update={"experts": 8, "experts_per_token": 2})
    layout: dict[str, object] = {"tp": 2, "dp": 4, "zero": 1, "sequence_parallel": True}
    split, whole, two = (
        on_stage(model, one(layout | degrees)) for degrees in ({"ep": 4}, {"ep": 8, "etp": 1}, {"ep": 4, "etp": 1})
    )
    for name in ("weights", "gradients", "optimizer"):
        assert whole[name] == pytest.approx(split[name])
    copies = 2 * model.experts_per_token * model.hidden * 2  # of each token, before and after the experts
    assert split["activations"] - whole["activations"] == pytest.approx(model.layers * model.seq_len * copies / 2)
    an_expert = model.layers * 3 * model.hidden * model.ffn_hidden
    assert two["weights"] - whole["weights"] == pytest.approx(2 * an_expert)
    assert two["optimizer"] == pytest.approx(whole["optimizer"]), "two ranks share it out"


def test_weights_of_all_ranks_are_the_models_without_what_is_replicated() -> None:
    model = SMALL.model_copy(update={"experts": 8, "experts_per_token": 2})
    c = Configurations.of([one({"tp": 2, "dp": 4, "ep": 4})])
    weights = stage_weights(model, c, MEGATRON, "first")
    assert weights.experts[0] * 2 * 4 == model.layers * 8 * 3 * model.hidden * model.ffn_hidden
    replicated = model.layers * model.hidden * (2 + 8) + model.hidden  # norms and routers, the last norm
    rest = model.parameters - weights.experts[0] * 8 - replicated
    assert (weights.dense[0] - replicated) * 2 == rest


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers_are_korthikantis(tp: int, sequence_parallel: bool) -> None:
    """2205.05198, table 2, with s = 2048, b = 4."""
    if sequence_parallel and tp == 1:
        return
    s, b, h, a = 2048, 4, 6144, 64
    model = SMALL.model_copy(
        update={"hidden": h, "ffn_hidden": 4 * h, "heads": a, "kv_heads": a, "seq_len": s, "gated_mlp": False}
    )
    scores = 5 * a * s / h
    expected = {
        "none": (34 + scores) / tp if sequence_parallel else 10 + 24 / tp + scores / tp,
        "selective": 34 / tp if sequence_parallel else 10 + 24 / tp,
        "full": 2 / tp if sequence_parallel else 2,
    }
    for recompute, per_element in expected.items():
        layout = {"tp": tp, "sequence_parallel": sequence_parallel, "recompute": recompute}
        found = layer_activations(model, Configurations.of([one(layout, micro_batch=b)]), 2, KORTHIKANTI)
        assert found.kept[0] == pytest.approx(s * b * h * per_element)


def test_micro_batches_in_flight() -> None:
    """1F1B and interleaved: 16 layers on 4 stages."""

    def in_flight(last: bool, count: int = 32, **layout: int) -> float:
        c = Configurations.of([one({"pp": 4, **layout}, count=count)])
        return float(layers_in_flight(SMALL, c, MEGATRON, "last" if last else "first")[0])

    assert in_flight(False) == 16
    assert in_flight(True) == 4
    assert in_flight(False, count=2) == 8
    assert in_flight(False, vp=2) == 16 * (1 + 3 / (4 * 2))
    assert in_flight(True, vp=2) == 2 * (4 + 1)


def test_balanced_stages_take_layers_from_the_last_one() -> None:
    model = SMALL.model_copy(update={"vocab": 40000})
    c = Configurations.of([one({"pp": 4}, count=8)])
    heavy = [layers_in_flight(model, c, PYTORCH, stage)[0] for stage in ("first", "last")]
    assert heavy[0] / 4 * 3 + heavy[1] == model.layers
    assert heavy[1] < heavy[0] / 4


def test_larger_models_are_in_the_right_place() -> None:
    """Llama 3 8B: 8.03 B weights take 18 bytes each; with ZeRO-1 over 64 replicas 6.2."""
    model = ModelShape(
        **{"layers": 32, "hidden": 4096, "ffn_hidden": 14336, "heads": 32, "kv_heads": 8, "seq_len": 8192},
        vocab=128256,
    )
    parts = predict(model, one({"tp": 4, "dp": 64, "zero": 1, "sequence_parallel": True}))[1]
    state = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert state == pytest.approx(8.03e9 / 4 * (6 + 12 / 64), rel=0.01)


GATHERED = Implementation(weights="gathered")


def test_fsdp_has_all_gathered_weights_beside_all_gradients_only_if_it_accumulates() -> None:
    weights = stage_weights(SMALL, Configurations.of([one()]), GATHERED, "first").dense[0]
    _, once, _ = predict(SMALL, one(), GATHERED)
    _, twice, _ = predict(SMALL, one(count=2), GATHERED)
    assert (once["weights"] + once["gradients"]) / weights < 4.5
    assert (twice["weights"] + twice["gradients"]) / weights == pytest.approx(2 + 4)


@everything
@given(models(), configurations(), st.sampled_from(["fp32", "bf16"]), st.sampled_from([2, 4]))
def test_more_of_anything_in_fsdp_takes_no_less_memory(model, configuration, precision, times) -> None:
    """The fullest moment is another one, but never a smaller one."""
    flat = changed(configuration, pp=1, vp=1, cp=1, sequence_parallel=False)
    peak, parts, _ = predict(model, flat, GATHERED, precision)
    assert min(parts.values()) >= 0
    larger = flat.model_copy(update={"micro_batch": 2 * flat.micro_batch, "global_batch": 2 * flat.global_batch})
    more = flat.model_copy(update={"global_batch": times * flat.global_batch})
    for other in (larger, more):
        assert predict(model, other, GATHERED, precision)[0] >= peak * (1 - 1e-12)


def test_the_update_of_weights_without_masters_may_be_the_fullest_moment() -> None:
    """It makes fp32 copies of the largest weight and of its gradient. With masters torch's fused update makes none."""
    model = SMALL.model_copy(update={"layers": 1, "vocab": 512_000, "seq_len": 16})
    state = {"masters": False, "scratch_of_matrices": 1.0, "scratch_of_others": 1.0, "of_embeddings": 0}
    how = Implementation(optimizer=OptimizerState(**state))
    _, parts, _ = predict(model, one(), how)
    assert parts["working"] == pytest.approx(4 * 2 * model.padded_vocab * model.hidden), "the gradient is fp32 already"
    assert (parts["activations"], parts["logits"]) == (0, 0)
    assert predict(model, one(), Implementation())[1]["logits"] > 0


LATENT = {"kv_rank": 512, "query_rank": 1536, "rope_dim": 64, "value_dim": 128}
DEEPSEEK_V3 = ModelShape(
    **{"layers": 61, "hidden": 7168, "ffn_hidden": 18432, "heads": 128, "kv_heads": 128, "seq_len": 4096},
    **{"vocab": 129280, "head_dim": 192, "latent_attention": LATENT, "gated_mlp": True, "dense_layers": 3},
    **{"experts": 256, "experts_per_token": 8, "expert_hidden": 2048, "shared_expert_hidden": 2048},
)
ON_64 = Configurations.of([Configuration(layout=Layout(dp=64, ep=64), micro_batch=1, global_batch=64)])


def kept_by_a_layer(**changes: Any) -> float:
    """Bytes of DeepSeek-V3's layer with Transformer Engine, changed like this."""
    how = MEGATRON_TE.model_copy(update=changes)
    return float(layer_activations(DEEPSEEK_V3, ON_64, 2, how).kept[0])


def test_kernels_of_another_stack_and_a_short_optimizer_take_less() -> None:
    own = layer_activations(DEEPSEEK_V3, ON_64, 2, MEGATRON).kept[0]
    assert kept_by_a_layer() < 0.75 * own
    small = MEGATRON.model_copy(update={"optimizer": OptimizerState(bytes_of_number=2)})
    parts = [stage_components(DEEPSEEK_V3, ON_64, "bf16", how, "first")["optimizer"][0] for how in (small, MEGATRON)]
    assert parts[0] == pytest.approx(parts[1] * 8 / 12, rel=0.01)


def test_recomputed_modules_save_the_shares_of_deepseek_v3_that_were_published() -> None:
    """The report on Megatron-core's mixtures of experts (2603.07685, table 3): of 131 GB of activations without any of
    these, 26 are saved by the router's probabilities before an expert's second matrix, 30.4 by latent attention's
    projections, and 8.2 by the norms. Shares need not know how many layers are in flight, which it does not say."""
    everything = kept_by_a_layer(expert_outputs="kept")
    assert (everything - kept_by_a_layer()) / everything == pytest.approx(26 / 131, rel=0.05)
    latent = kept_by_a_layer() - kept_by_a_layer(recomputed_modules=("latent",))
    assert latent / everything == pytest.approx(30.4 / 131, rel=0.05)


def test_the_saving_of_recomputed_norms_is_a_fifth_below_what_was_published() -> None:
    """Two vectors of the width of the model for a token; what else the report's 8.2 of 131 GB have is not known."""
    norms = kept_by_a_layer() - kept_by_a_layer(recomputed_modules=("norms",))
    assert norms == 2 * 2 * 7168 * 4096
    assert norms / kept_by_a_layer(expert_outputs="kept") == pytest.approx(8.2 / 131, rel=0.25)


def test_as_many_layers_as_the_model_has_keep_what_was_published() -> None:
    """131 GiB; an interleaved pipeline of four stages would have 1.19 times as many in flight."""
    assert 61 * kept_by_a_layer(expert_outputs="kept") == pytest.approx(131 * GIB, rel=0.05)


def test_a_stack_of_another_framework_does_not_change_the_memory() -> None:
    assert PYTORCH.as_stack("megatron-te") == PYTORCH.model_copy(update={"stack": "megatron-te"})


def test_fits_leaves_room_and_a_margin() -> None:
    c = Configurations.of([one(), one(micro_batch=8)])
    memory = MemoryModel()
    peaks = memory.predict(SMALL, c, "bf16", coverage=None).peak_bytes
    enough = peaks[0] + OUTSIDE_BYTES
    assert memory.fits(SMALL, c, "bf16", enough).tolist() == [True, False]
    assert memory.fits(SMALL, c, "bf16", enough, margin=0.01).tolist() == [False, False]


def test_the_chance_to_fit_falls_as_the_peak_grows() -> None:
    c = Configurations.of(one(micro_batch=size) for size in (1, 8, 64, 512))
    found = MemoryModel().predict(SMALL, c, "bf16")
    chances = found.chance_to_fit(found.peak_bytes[2] + OUTSIDE_BYTES)
    assert chances[2] == pytest.approx(0.5)
    assert (np.diff(chances) < 0).all()
    assert chances[0] > 0.99
    assert chances[3] < 0.01


def test_many_at_once_are_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    few = [one({"tp": int(2 ** rng.integers(0, 3)), "pp": int(2 ** rng.integers(0, 3))}, count=4) for _ in range(50)]
    many = Configurations.of(few * (CHUNK // 25))
    assert len(many) > CHUNK
    whole = MemoryModel().predict(SMALL, many, "bf16")
    single = [predict(SMALL, c)[0] for c in few]
    np.testing.assert_allclose(whole.peak_bytes, single * (CHUNK // 25))
    np.testing.assert_allclose(MemoryModel().predict(SMALL, many, "bf16", coverage=None).peak_bytes, whole.peak_bytes)


def test_no_configurations_is_no_predictions() -> None:
    found = MemoryModel().predict(SMALL, Configurations.of([]), "bf16")
    assert len(found.peak_bytes) == len(found.low) == 0
