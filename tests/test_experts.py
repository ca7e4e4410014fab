"""Mixtures of experts on Megatron: the same losses and part norms on every layout, moves to the bit, and how tokens
spread over the experts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from copus.backends import initial_weights
from copus.backends.huggingface import mean_loss
from copus.backends.initial_weights import initial_weight
from copus.backends.megatron.description import replicas_of_part
from copus.backends.megatron.shard_table import shard_table
from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest
from copus.backends.vocabulary import hide_padding
from copus.estimate import estimate_of
from copus.expert_load import expert_load
from copus.job import JobError
from copus.reshard.boxes import Box
from copus.weights.megatron_names import hugging_face_parts
from planner.noise_sources import MICROBATCH, NORMLAYER
from profiles.configurations import Configurations
from profiles.huggingface_config import config_fields
from profiles.huggingface_values import config_values
from profiles.layout import Layout
from profiles.memory import MEGATRON
from profiles.memory.parameters import Stage, stage_weights
from profiles.model_shape import ModelShape
from tests.megatron_jobs import RULES, SHAPE, backend_of, configuration, random_batches, save_checkpoint, tiny_job
from tests.ranks import run_ranks

MOE: dict[str, Any] = {
    **{"experts": 4, "experts_per_token": 2, "kv_heads": 2, "tied_embeddings": True, "shared_expert_hidden": 16},
    **{"dense_layers": 1, "expert_hidden": 24, "router": {"aux_loss": 0.05, "z_loss": 0.001}},
}
WITH_BIASES = MOE | {
    "router": {
        **{"scores": "sigmoid", "bias_update_rate": 0.02, "scale": 2.5, "groups": 2, "groups_per_token": 1},
        "aux_loss": 0.001,
    }
}
SPLIT: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
BATCH = 8
SOURCE = "microbatch+normlayer"
Figures = tuple[list[float], float, list[np.ndarray]]
"""Losses; |g|² of the first step; |g_j|² of its parts, those of micro-batches and those of norm layers."""


def _with_micro_batches_of(ep: int, dp: int) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Batches of one rank whose micro-batches of `ep` sequences are those that `ep` replicas run at a time, each one
    sequence."""
    of_replica = BATCH // dp
    order = [
        replica * of_replica + count
        for group in range(dp // ep)
        for count in range(of_replica)
        for replica in range(group * ep, group * ep + ep)
    ]

    def batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = [place // BATCH * BATCH + order[place % BATCH] for place in range(first, first + count)]
        pairs = [random_batches(place, 1) for place in places]
        return torch.cat([tokens for tokens, _ in pairs]), torch.cat([labels for _, labels in pairs])

    return batches


def _train(
    layout: dict[str, Any], model: dict[str, Any], dispatch: str, as_replicas: tuple[int, int], steps: int
) -> Figures:
    """One sequence a micro-batch, or on one rank those that `as_replicas` (number, dp) run together."""
    ep, dp = as_replicas
    ranks = dist.get_world_size()
    job = tiny_job(ranks, layout, model, micro_batch=ep if ranks == 1 else 1, expert_dispatch=dispatch)
    backend, batches = backend_of(job), _with_micro_batches_of(ep, dp) if ranks == 1 else random_batches
    results = [
        backend.train_step(batches, StepRequest(BATCH * step, RULES, SOURCE if step == 0 else None))
        for step in range(steps)
    ]
    parts = (results[0].parts, results[0].norm_layer_parts)
    squares = [np.sort(kind.squared_norms) for kind in parts if kind is not None]
    assert [len(kind) for kind in squares] == [BATCH // ep, BATCH]
    return [result.loss for result in results], results[0].grad_sq, squares


def _ranks(layout: dict[str, Any]) -> int:
    return int(np.prod([layout.get(degree, 1) for degree in ("tp", "pp", "dp")]))


def _check_equal(layout: dict[str, Any], model: dict[str, Any], dispatch: str, steps: int) -> None:
    as_replicas = (replicas_of_part(Layout(**layout)), layout.get("dp", 1))
    losses, grad_sq, parts = run_ranks(1, _train, {}, model, "alltoall", as_replicas, steps)[0]
    other_losses, other_grad_sq, other_parts = run_ranks(
        _ranks(layout), _train, layout, model, dispatch, as_replicas, steps
    )[0]
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
    assert other_grad_sq == pytest.approx(grad_sq, rel=1e-5)
    for kind, other_kind in zip(parts, other_parts, strict=True):
        np.testing.assert_allclose(other_kind, kind, rtol=1e-5)


@pytest.mark.dist
def test_two_ranks_that_share_the_experts_out_train_as_one() -> None:
    _check_equal({"dp": 2, "ep": 2, "zero": 1}, MOE, "alltoall", steps=6)


@pytest.mark.dist
def test_tensor_parallel_ranks_with_experts_of_their_own_train_as_one() -> None:
    _check_equal({**SPLIT, "ep": 2, "etp": 1, "zero": 1}, MOE, "alltoall", steps=6)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "model", "dispatch"),
    [
        ({"tp": 2, "sequence_parallel": True}, MOE, "alltoall"),
        ({"pp": 2}, MOE, "alltoall"),
        ({"dp": 2}, WITH_BIASES, "alltoall"),
        ({"dp": 2, "ep": 2}, WITH_BIASES, "allgather"),
        ({"tp": 2, "sequence_parallel": True, "dp": 2, "ep": 2}, MOE, "alltoall"),
        ({"tp": 2, "sequence_parallel": True, "dp": 2, "ep": 2, "zero": 1}, WITH_BIASES, "allgather"),
        ({"pp": 2, "dp": 2, "ep": 2, "zero": 1}, WITH_BIASES, "alltoall"),
        ({"pp": 2, "vp": 2, "dp": 2, "ep": 2}, MOE, "alltoall"),
        ({"dp": 4, "ep": 2, "zero": 1}, MOE, "alltoall"),
        ({"dp": 4, "ep": 4}, MOE, "alltoall"),
        ({"dp": 2, "ep": 2, "recompute": "full"}, MOE, "alltoall"),
        ({**SPLIT, "dp": 2, "ep": 2, "etp": 1}, MOE, "alltoall"),
        ({**SPLIT, "dp": 2, "ep": 4, "etp": 1}, MOE, "allgather"),
        ({**SPLIT, "dp": 2, "ep": 2, "etp": 1, "zero": 1}, WITH_BIASES, "allgather"),
        ({**SPLIT, "dp": 2, "ep": 4, "etp": 1, "zero": 1}, WITH_BIASES, "alltoall"),
        ({**SPLIT, "pp": 2, "ep": 2, "etp": 1, "zero": 1}, MOE, "alltoall"),
        ({**SPLIT, "tp": 4, "ep": 2, "etp": 2}, MOE | {"kv_heads": 4}, "alltoall"),
    ],
    ids=str,
)
def test_every_layout_trains_as_one_rank(layout: dict[str, Any], model: dict[str, Any], dispatch: str) -> None:
    _check_equal(layout, model, dispatch, steps=20)


def _adam_figures(layout: dict[str, Any], as_replicas: tuple[int, int]) -> tuple[float, np.ndarray]:
    """|g|² and |g_j|² divided by Adam's √v̂, of the third step."""
    ep, dp = as_replicas
    ranks = dist.get_world_size()
    job = tiny_job(ranks, layout, MOE, micro_batch=ep if ranks == 1 else 1)
    job = job.model_copy(update={"planner": job.planner.model_copy(update={"noise_metric": "adam"})})
    backend, batches = backend_of(job), _with_micro_batches_of(ep, dp) if ranks == 1 else random_batches
    for step in range(3):
        result = backend.train_step(batches, StepRequest(BATCH * step, RULES, MICROBATCH))
    assert result.parts is not None
    return result.parts.grad_sq, np.sort(result.parts.squared_norms)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_norms_in_adams_metric_are_those_of_one_rank(zero: int) -> None:
    grad_sq, parts = run_ranks(1, _adam_figures, {}, (2, 4))[0]
    other_grad_sq, other_parts = run_ranks(4, _adam_figures, {"dp": 4, "ep": 2, "zero": zero}, (2, 4))[0]
    assert other_grad_sq == pytest.approx(grad_sq, rel=1e-2)
    np.testing.assert_allclose(other_parts, parts, rtol=1e-2)


def _tour(layouts: list[dict[str, Any]], precision: str, folder: str) -> tuple[list[str], list[float]]:
    """What was not the same after the state went through all layouts and back, and after it was loaded from a
    checkpoint of another layout; and the loss of the same step after each of both."""
    job = tiny_job(dist.get_world_size(), layouts[0], WITH_BIASES, micro_batch=1, precision=precision)
    backend = backend_of(job)
    for step in range(3):  # after an even number biases may be where they began
        backend.train_step(random_batches, StepRequest(8 * step, RULES))
    before = {place: tensor().clone() for place, tensor in backend.live_state().items()}
    assert any("e_score_correction_bias" in name and tensor.any() for (name, _), tensor in before.items())
    for layout in [*layouts[1:], layouts[0]]:
        backend.move(configuration(BATCH, 1, **layout))
    after = {place: tensor() for place, tensor in backend.live_state().items()}
    assert before.keys() == after.keys()
    changed = [name for (name, place), tensor in before.items() if not torch.equal(tensor, after[name, place])]

    save_checkpoint(backend, Path(folder) / "state")
    moved = backend.train_step(random_batches, StepRequest(24, RULES)).loss
    backend.close()
    backend.build(configuration(BATCH, 1, **layouts[1]))
    backend.load(Path(folder) / "state", 3)
    loaded = backend.train_step(random_batches, StepRequest(24, RULES)).loss
    backend.load(Path(folder) / "state", 3)
    backend.move(configuration(BATCH, 1, **layouts[0]))
    after = {place: tensor() for place, tensor in backend.live_state().items()}
    changed += [f"{name} loaded" for (name, at), tensor in before.items() if not torch.equal(tensor, after[name, at])]
    return changed, [moved, loaded]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layouts", "precision"),
    [
        (
            [
                {"dp": 2, "ep": 2, "zero": 1},
                {"dp": 2},
                {"pp": 2},
                {"tp": 2, "sequence_parallel": True},
                {**SPLIT, "ep": 2, "etp": 1},
                {"dp": 2, "zero": 1},
                {**SPLIT, "ep": 2, "etp": 1, "zero": 1},
                {"dp": 2, "ep": 2},
            ],
            "fp32",
        ),
        pytest.param(
            [
                {"dp": 4, "ep": 2, "zero": 1},
                {"tp": 2, "sequence_parallel": True, "dp": 2, "ep": 2},
                {"pp": 2, "dp": 2, "ep": 2, "zero": 1},
                {**SPLIT, "dp": 2, "ep": 2, "etp": 1, "zero": 1},
                {"dp": 4, "ep": 4},
                {**SPLIT, "dp": 2, "ep": 4, "etp": 1},
                {**SPLIT, "pp": 2, "ep": 2, "etp": 1, "zero": 1},
                {"tp": 2, "sequence_parallel": True, "pp": 2, "zero": 1},
                {"pp": 2, "vp": 2, "dp": 2, "zero": 1},
            ],
            "bf16",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two ranks", "four ranks"],
)
def test_moves_and_a_checkpoint_change_no_bit(layouts: list[dict[str, Any]], precision: str, tmp_path: Path) -> None:
    ranks = layouts[0]["dp"]
    for changed, (moved, loaded) in run_ranks(ranks, _tour, layouts, precision, str(tmp_path)):
        assert changed == []
        assert loaded == pytest.approx(moved, rel=1e-2 if precision == "bf16" else 1e-5)


def _with_capacity(capacity_factor: float | None) -> list[tuple[float, float]]:
    model = MOE | {"capacity_factor": capacity_factor, "dense_layers": 3}
    backend = backend_of(tiny_job(1, {}, model, micro_batch=2))
    results = [backend.train_step(random_batches, StepRequest(8 * step, RULES)) for step in range(2)]
    return [tuple(result.expert_load) for result in results if result.expert_load is not None]


@pytest.mark.dist
def test_a_capacity_factor_drops_tokens_and_bounds_the_load() -> None:
    free, tight = run_ranks(1, _both_capacities)[0]
    assert [dropped for _, dropped in free] == [0, 0]
    for imbalance, dropped in tight:
        assert 0 < dropped < 1
        assert imbalance <= 1 / (1 - dropped) + 1e-6, "no expert takes more than its equal share of all tokens"


def _both_capacities() -> list[list[tuple[float, float]]]:
    return [_with_capacity(None), _with_capacity(1.0)]


def test_the_load_is_that_of_the_worst_layer() -> None:
    model = ModelShape(**SHAPE, experts=4, experts_per_token=2)  # type: ignore[arg-type]
    tokens = np.array([[8.0, 8, 8, 8], [16, 4, 4, 4]])
    load = expert_load(tokens, model, global_batch=1)  # 16 tokens, to 2 experts each
    assert load.imbalance == 16 / 7
    assert load.dropped == pytest.approx(4 / 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 2, "experts_per_token": 4}, r"experts_per_token\(4\) is larger than experts\(2\)"),
        ({"experts": 4, "dense_layers": 4}, r"dense_layers\(4\) of layers\(4\) leave none with experts"),
        ({"experts": 4, "expert_hidden": 8}, r"expert_hidden needs dense_layers"),
        ({"shared_expert_hidden": 8}, r"shared_expert_hidden needs experts"),
        ({"capacity_factor": 1.0}, r"capacity_factor needs experts"),
        ({"router": {"scores": "sigmoid"}}, r"router needs experts"),
        ({"experts": 4, "bias": "all"}, r"bias\(all\): experts have no biases"),
        ({"experts": 4, "router": {"bias_update_rate": 0.001}}, r"bias_update_rate\(0.001\) needs router.scores\(sigm"),
        ({"experts": 4, "router": {"groups": 3}}, r"experts\(4\) ÷ router.groups\(3\) is not whole: 1.33333"),
        (
            {"experts": 8, "experts_per_token": 4, "router": {"groups": 4}},
            r"experts_per_token\(4\) is larger than experts\(8\) ÷ router.groups\(4\) × router.groups_per_token\(1\)",
        ),
    ],
)
def test_impossible_experts_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelShape(**{**SHAPE, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ({"dp": 4, "ep": 4}, {"experts": 6}, "training.layout: model.experts(6) ÷ ep(4) is not whole: 1.5"),
        ({"tp": 4, "ep": 2}, MOE | {"kv_heads": 4}, "training.layout: dp·cp(1) ÷ ep(2) is not whole: 0.5"),
        ({"dp": 2, "ep": 2}, {}, "training.layout: ep(2) needs a model with experts"),
        ({"tp": 4}, MOE | {"kv_heads": 4}, "tp(4) of a model with experts needs sequence_parallel: true"),
        (
            {"tp": 4, "sequence_parallel": True},
            MOE | {"kv_heads": 4, "expert_hidden": 22},
            "training.layout: model.expert_hidden(22) ÷ tp(4) is not whole: 5.5",
        ),
        ({"tp": 2, "etp": 1}, {"kv_heads": 2}, "training.layout: etp(1) needs a model with experts"),
        ({**SPLIT, "etp": 4}, MOE, "training.layout: tp(2) ÷ etp(4) is not whole: 0.5"),
        ({**SPLIT, "ep": 4, "etp": 1}, MOE, "training.layout: tp·cp·dp(2) ÷ etp·ep(4) is not whole: 0.5"),
        ({**SPLIT, "dp": 2, "etp": 1}, MOE, "etp·ep(1) ÷ tp·cp(2) is not whole: 0.5; the megatron backend shares"),
    ],
)
def test_impossible_layouts_of_experts_are_refused(layout: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as refused:
        tiny_job(_ranks(layout), layout, model)
    assert message in str(refused.value)


def test_how_tokens_are_sent_needs_experts() -> None:
    with pytest.raises(JobError, match=r"training.expert_dispatch\(allgather\) needs a model with experts"):
        tiny_job(1, {}, expert_dispatch="allgather")


def test_step_times_are_predicted_for_the_way_in_which_the_job_sends_tokens() -> None:
    for dispatch in ("alltoall", "allgather"):
        job = tiny_job(2, {"dp": 2, "ep": 2}, MOE, micro_batch=1, expert_dispatch=dispatch)
        assert any(f"({dispatch})" in said for said in estimate_of(job).predictor.assumptions)


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        ({"dp": 4, "ep": 2}, (4, 4)),
        ({**SPLIT, "dp": 4, "ep": 2}, (4, 4)),
        ({**SPLIT, "dp": 4, "ep": 2, "etp": 1}, (8, 2)),
        ({**SPLIT, "dp": 4, "ep": 8, "etp": 1}, (2, 8)),
    ],
)
def test_a_part_is_a_micro_batch_of_all_replicas_that_share_experts_out(
    layout: dict[str, Any], parts: tuple[int, int]
) -> None:
    found = find_backend("megatron").parts(configuration(16, 2, **layout))
    assert found == {MICROBATCH: parts, NORMLAYER: (16, 1)}


def test_the_degree_of_all_else_is_that_of_the_experts_unless_another_is_given() -> None:
    as_written = Layout(tp=4, ep=2, dp=2, etp=4)
    assert as_written == Layout(tp=4, ep=2, dp=2)
    assert as_written.label == "TP4·PP1·DP2·EP2"
    assert Layout(tp=4, ep=2, dp=2, etp=1).label == "TP4·PP1·DP2·EP2·ETP1"
    for layout in (as_written, Layout(tp=4, ep=2, dp=2, etp=2)):
        one = configuration(8, 1, **layout.model_dump())
        assert Configurations.of([one])[0] == one


def test_experts_have_the_names_that_hugging_face_gives_them() -> None:
    model = ModelShape(**{**SHAPE, **MOE})

    def names(name: str, *shape: int) -> list[str]:
        return [part.name for part in hugging_face_parts(f"decoder.layers.3.{name}", shape, Box.whole(shape), model)]

    layer = "model.layers.3.mlp"
    expert = f"{layer}.experts.2"
    assert names("mlp.experts.local_experts.2.linear_fc1.weight", 48, 32) == [
        f"{expert}.gate_proj.weight",
        f"{expert}.up_proj.weight",
    ]
    assert names("mlp.experts.local_experts.2.linear_fc2.weight", 32, 24) == [f"{expert}.down_proj.weight"]
    assert names("mlp.shared_experts.linear_fc2.weight", 32, 16) == [f"{layer}.shared_experts.down_proj.weight"]
    assert names("mlp.router.weight", 4, 32) == [f"{layer}.gate.weight"]
    assert names("mlp.router.expert_bias", 4) == [f"{layer}.gate.e_score_correction_bias"]


def test_a_model_with_experts_becomes_a_configuration_of_the_family_that_has_it() -> None:
    def family(**fields: Any) -> str:
        return str(config_values(ModelShape(**{**SHAPE, "experts": 4, "experts_per_token": 2, **fields}))["model_type"])

    assert family(router={"aux_loss": 0.5}, capacity_factor=1.5) == "mixtral"
    assert family(qk_norm="head", router={"normalized": False}) == "qwen3_moe"
    for fields in ({"router": {"normalized": False}}, {"shared_expert_hidden": 16}, {"router": {"scores": "sigmoid"}}):
        with pytest.raises(ValueError, match="no family of Hugging Face has this model"):
            family(**fields)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(dp=4, ep=2),
        Layout(tp=2, sequence_parallel=True, pp=2, dp=2, ep=2),
        Layout(pp=4),
        Layout(dp=8, ep=4, zero=1),
        Layout(tp=2, sequence_parallel=True, dp=4, ep=2, etp=1),
        Layout(tp=2, sequence_parallel=True, pp=2, dp=2, ep=4, etp=1, zero=1),
    ],
    ids=lambda layout: layout.label,
)
def test_the_table_has_every_expert_and_the_memory_model_counts_them(layout: Layout) -> None:
    job = tiny_job(layout.accelerators, layout.model_dump(), MOE | {"tied_embeddings": False})
    table = shard_table(job, layout)
    configurations = Configurations.of([configuration(8, 1, **layout.model_dump())])
    stages: tuple[tuple[int, Stage], ...] = ((0, "first"), (layout.accelerators - 1, "last"))
    for rank, stage in stages:
        held = table.of_rank(rank).values()
        counted = stage_weights(job.model, configurations, MEGATRON, stage)
        weights = [(field.name, box.elements) for field, box in held if "/" not in field.name]
        experts = sum(elements for name, elements in weights if ".mlp.experts." in name)
        dense = sum(elements for name, elements in weights) - experts
        assert (counted.experts[0], counted.dense[0]) == (experts, dense)
    expert_weights = [
        index for index, fields in enumerate(table.groups) if fields[0].name.endswith("experts.3.up_proj.weight")
    ]
    assert len(expert_weights) == job.model.expert_layers
    optimizer_rows = np.isin(table.group, [index for index, fields in enumerate(table.groups) if "/" in fields[0].name])
    elements = (table.stop - table.start).prod(axis=1)[optimizer_rows].sum()
    copies = 1 if layout.zero else layout.dp
    expert_copies = 1 if layout.zero else layout.tp * layout.dp // (layout.expert_tp * layout.ep)
    replicated = (layout.tp - 1) * (job.model.layers * job.model.whole_vectors + job.model.hidden)
    replicated += (layout.tp - 1) * job.model.expert_layers * job.model.hidden * job.model.experts
    experts = job.model.expert_layers * job.model.experts * job.model.expert_matrices
    assert elements == copies * (job.model.parameters - experts + replicated) + expert_copies * experts


DIMENSIONS = {
    **{"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5, "head_dim": 8, "tie_word_embeddings": False},
    **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "num_experts_per_tok": 4},
}
AS_IN_TRANSFORMERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # without fields: those read from it
    *(
        (
            "qwen3_moe",
            {"num_experts": 8, "moe_intermediate_size": 48, "norm_topk_prob": normalized},
            {"qk_norm": "head", "router": {"normalized": normalized, "aux_loss": 0}},
        )
        for normalized in (True, False)
    ),
    *(
        (
            "deepseek_v3",
            {
                **{"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24, "n_group": 4},
                **{"topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": query_rank, "kv_lora_rank": 10},
                **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4},
                "head_dim": 4,  # what is rotated
                "rms_norm_eps": 1e-6,  # the norms of the narrow vectors have no other
                "rope_parameters": {"rope_theta": 1e4, **scaling},
            },
            {},
        )
        for query_rank, scaling in (
            (12, {"rope_type": "default"}),
            (
                None,
                {
                    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32},
                    **{"beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
                },
            ),
        )
    ),
    (
        "glm4_moe",  # routes as DeepSeek-V3 does
        {
            **{"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
            **{"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "use_qk_norm": False},
            "rope_parameters": DIMENSIONS["rope_parameters"] | {"partial_rotary_factor": 1.0},  # type: ignore[operator]
        },
        {
            **{"dense_layers": 1, "expert_hidden": 24, "shared_expert_hidden": 24},
            "router": {"scores": "sigmoid", "groups": 4, "groups_per_token": 2, "scale": 2.5, "aux_loss": 0},
        },
    ),
]


def _losses_of_both() -> list[tuple[float, float]]:
    """Of models with large weights, so that everything in them matters."""
    initial_weights._INIT_STD = 0.5
    pairs = []
    for kind, config, fields in AS_IN_TRANSFORMERS:
        described = AutoConfig.for_model(kind, **{**DIMENSIONS, **config})
        shape = {"experts": 8, "experts_per_token": 4, "kv_heads": 2, **fields}
        if not fields:
            shape = config_fields(json.loads(json.dumps(described.to_dict()))) | {"vocab": 250}
            shape["router"] |= {"aux_loss": 0}
        job = tiny_job(1, {}, shape, micro_batch=8)
        backend = backend_of(job)
        ours = backend.train_step(random_batches, StepRequest(0, RULES)).loss
        backend.close()
        theirs = AutoModelForCausalLM.from_config(described)
        _fill(theirs, job.model, job.training.seed)
        theirs.lm_head.register_forward_hook(lambda module, inputs, logits: hide_padding(logits, 250))
        pairs.append((ours, mean_loss(theirs, *random_batches(0, 8)).item()))
    return pairs


def _fill(network: Any, model: ModelShape, seed: int) -> None:
    """Put our initial weights into a model of transformers, whose experts are one tensor."""

    def start(name: str, *shape: int) -> torch.Tensor:
        return initial_weight(name, shape, model.layers, seed, torch.device("cpu"))

    for name, weight in network.state_dict(keep_vars=True).items():
        layer, _, which = name.rpartition(".")
        if not layer.endswith("mlp.experts"):
            weight.data.copy_(start(name, *weight.shape))
            continue
        for expert in range(model.experts):
            parts = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
            height = weight.shape[1] // len(parts)
            own = [start(f"{layer}.{expert}.{part}.weight", height, weight.shape[2]) for part in parts]
            weight.data[expert] = torch.cat(own)


@pytest.mark.dist
def test_megatron_computes_what_transformers_computes() -> None:
    for ours, theirs in run_ranks(1, _losses_of_both)[0]:
        assert ours == pytest.approx(theirs, rel=1e-5)
