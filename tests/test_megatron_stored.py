"""Where Megatron-LM's checkpoints have a weight, and which weights a part of such a tensor has."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copus.reshard.boxes import Box
from copus.weights.megatron_names import without_fusion
from copus.weights.megatron_stored import place_of, weights_in
from copus.weights.megatron_weights import weights_in_megatron
from profiles.latent_attention import LatentAttention
from profiles.model_shape import ModelShape


def model_of(dense_layers: int = 0, latent: bool = False) -> ModelShape:
    attention = LatentAttention(kv_rank=4, rope_dim=2, value_dim=4, query_rank=4) if latent else None
    return ModelShape(
        **{"layers": 3, "hidden": 8, "ffn_hidden": 12, "heads": 2, "kv_heads": 2, "seq_len": 4, "vocab": 128},
        **{"experts": 4, "experts_per_token": 2, "shared_expert_hidden": 6},
        expert_hidden=6 if dense_layers else None,
        dense_layers=dense_layers,
        latent_attention=attention,
    )


@given(st.booleans(), st.booleans(), st.data())
def test_every_weight_is_found_again_however_its_tensor_was_cut(
    has_dense_layer: bool, is_latent: bool, data: st.DataObject
) -> None:
    model = model_of(int(has_dense_layer), is_latent)
    name, shape = data.draw(st.sampled_from(sorted(weights_in_megatron(model).items())))
    names, at, first_axes = place_of(name, model)
    tensor = np.arange(np.prod([*first_axes, *shape])).reshape(*first_axes, *shape)
    cuts = [data.draw(st.integers(0, length)) for length in tensor.shape]
    read = np.full(shape, -1)
    for lower in np.ndindex(*[2] * tensor.ndim):
        ends = [(0, cut) if low else (cut, size) for low, cut, size in zip(lower, cuts, tensor.shape, strict=True)]
        box = Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
        if not box.elements:
            continue
        part = tensor[tuple(slice(a, b) for a, b in ends)]
        for stored_name in names:
            for weight in weights_in(without_fusion(stored_name), tensor.shape, box, model):
                if weight.name == name:
                    assert weight.shape == shape
                    flat = part.reshape(weight.stored.shape)
                    read[weight.box.slices_in(Box.whole(shape))] = flat[weight.box.slices_in(weight.stored)]
    np.testing.assert_array_equal(read, tensor[at])


def test_names_are_those_of_megatrons_own_layers_and_of_transformer_engines() -> None:
    moe, latent = model_of(), model_of(dense_layers=1, latent=True)
    expert = place_of("decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight", moe)
    assert expert == (("decoder.layers.mlp.experts.experts.linear_fc1.weight",), (2, 3), (3, 4))
    own = place_of("decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight", latent)
    assert own == (("decoder.layers.2.mlp.experts.experts.linear_fc1.weight",), (3,), (4,))
    assert place_of("decoder.layers.0.pre_mlp_layernorm.weight", moe).names == (
        *("decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"),
    )
    assert place_of("decoder.layers.1.self_attention.q_layernorm.weight", moe).names == (
        "decoder.layers.self_attention.q_layernorm.weight",
    )
    assert place_of("decoder.layers.1.self_attention.q_layernorm.weight", latent).names == (
        "decoder.layers.1.self_attention.linear_q_up_proj.layer_norm_weight",
        "decoder.layers.1.self_attention.q_layernorm.weight",
    )


def test_another_number_of_experts_is_told() -> None:
    name, shape = "decoder.layers.mlp.experts.experts.linear_fc2.weight", (3, 8, 5, 6)
    with pytest.raises(ValueError, match=r"linear_fc2.weight has 8 experts, and model.experts is 4"):
        list(weights_in(name, shape, Box.whole(shape), model_of()))
