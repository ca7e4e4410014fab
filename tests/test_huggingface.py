"""The model of a job as transformers builds it: its size, its weights at the start, recomputation, and loss."""

import math
from typing import Any

import pytest
import torch

from copus.backends.huggingface import (
    build_causal_lm,
    causal_lm_config,
    mean_loss,
    restore_rotary_frequencies,
)
from copus.backends.initial_weights import initial_weight
from copus.backends.norm_layers import NormLayers, norms_of
from profiles.model_shape import ModelShape
from profiles.rope import attention_factor, frequencies
from tests.megatron_jobs import SHAPE, random_batches

CPU = torch.device("cpu")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"gated_mlp": False},
    {"tied_embeddings": True},
    {"kv_heads": 2},
    {"gated_mlp": False, "bias": "all", "activation": "squared_relu", "head_dim": 12},
    {"bias": "attention", "rope_scaling": {"kind": "linear", "factor": 2}},
    {"bias": "qkv", "head_dim": 12, "rope_scaling": {"kind": "llama3", "factor": 8, "original_seq_len": 64}},
    {"qk_norm": "head", "head_dim": 16, "activation": "gelu_tanh", "kv_heads": 2},
    {
        **{"norm_position": "post", "qk_norm": "projection", "kv_heads": 2},
        **{"rope_scaling": {"kind": "yarn", "factor": 4, "original_seq_len": 64}},
    },
]


def _shape(variant: dict[str, Any]) -> ModelShape:
    return ModelShape(**{**SHAPE, **variant})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_has_as_many_weights_as_its_shape_says(variant: dict[str, Any]) -> None:
    shape = _shape(variant)
    model = build_causal_lm(shape, torch.float32, torch.device("meta"), None)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_model_guesses_and_recomputation_changes_nothing(variant: dict[str, Any]) -> None:
    shown = set()
    for recompute in ("none", "selective", "full"):
        model = build_causal_lm(_shape(variant), torch.float32, CPU, 1234, recompute)  # type: ignore[arg-type]
        loss = mean_loss(model, *random_batches(0, 4))
        loss.backward()
        grad_sq = sum(float(parameter.grad.double().square().sum()) for parameter in model.parameters())
        shown.add((loss.item(), grad_sq))
    ((loss_value, grad_sq),) = shown
    assert loss_value == pytest.approx(math.log(_shape(variant).vocab), abs=0.05), "rows that pad it take no part"
    assert grad_sq > 0.1


def test_weights_at_the_start_are_a_function_of_the_seed_and_the_name() -> None:
    first, again, other = (
        build_causal_lm(_shape({}), torch.float32, CPU, seed).state_dict() for seed in (1234, 1234, 1235)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first[name], initial_weight(name, first[name].shape, 4, 1234, CPU))
    assert not torch.equal(first[name], first["model.layers.2.mlp.up_proj.weight"])
    assert first["model.layers.3.mlp.down_proj.weight"].std() == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
    assert bool((first["model.norm.weight"] == 1).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_made_on_meta_computes_the_same_once_it_is_filled(variant: dict[str, Any]) -> None:
    filled = build_causal_lm(_shape(variant), torch.float32, CPU, 1234)
    model = build_causal_lm(_shape(variant), torch.float32, torch.device("meta"), None)
    model.to_empty(device=CPU)
    model.tie_weights()
    restore_rotary_frequencies(model)
    model.load_state_dict(filled.state_dict())
    assert torch.equal(mean_loss(model, *random_batches(0, 4)), mean_loss(filled, *random_batches(0, 4)))


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if "qk_norm" in variant])
def test_norm_layers_count_every_head_of_a_sequence(variant: dict[str, Any]) -> None:
    model = build_causal_lm(_shape(variant), torch.float32, CPU, 1234)
    layers = NormLayers(norms_of(model), sequence_axis=0, counts=True)
    layers.start(True)
    mean_loss(model, *random_batches(0, 4)).backward()
    seen = layers.collect(1, 4, CPU)
    layers.close()
    params = [parameter for name, parameter in model.named_parameters() if name in layers.names]
    for index in range(4):
        gradients = torch.autograd.grad(mean_loss(model, *random_batches(index, 1)), params)
        alone = sum(float(gradient.double().square().sum()) for gradient in gradients)
        assert seen[index] == pytest.approx(alone, rel=1e-4)


def test_a_bf16_model_keeps_rotary_frequencies_and_the_loss_in_fp32() -> None:
    model = build_causal_lm(_shape({}), torch.bfloat16, CPU, 1234)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert mean_loss(model, *random_batches(0, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    "scaling",
    [
        {"kind": "linear", "factor": 4},
        {"kind": "llama3", "factor": 8, "original_seq_len": 512, "high_freq_factor": 8},
        {"kind": "yarn", "factor": 4, "original_seq_len": 512},
        {"kind": "yarn", "factor": 32, "original_seq_len": 4096, "truncate": False, "attention_factor": 1.5},
    ],
    ids=str,
)
def test_rotary_frequencies_are_scaled_as_transformers_scales_them(scaling: dict[str, Any]) -> None:
    shape = _shape({"head_dim": 64, "rope_base": 5e5, "rope_scaling": scaling})
    rotary = build_causal_lm(shape, torch.float32, CPU, None).model.rotary_emb
    expected = frequencies(shape.rotary_width, shape.rope_base, shape.rope_scaling)
    torch.testing.assert_close(rotary.inv_freq.double(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(attention_factor(shape.rope_scaling))


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"norm": "layernorm"}, r"norm\(layernorm\) is not supported"),
        ({"positions": "learned"}, r"positions\(learned\) is not supported"),
        ({"sliding_window": 8}, r"sliding_window\(8\) is not supported"),
        ({"qk_norm": "projection"}, r"norm_position\(pre\) and qk_norm\(projection\): no model"),
        ({"bias": "qkv", "gated_mlp": False}, r"gated_mlp\(false\), bias\(qkv\)"),
    ],
)
def test_a_model_that_no_family_has_is_refused(variant: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_lm_config(_shape(variant))


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"experts\(4\): only dense models"):
        causal_lm_config(_shape({"experts": 4, "experts_per_token": 2}))
