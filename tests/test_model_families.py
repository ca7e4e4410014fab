"""Models of other families than Llama's, on Megatron: the same on every layout, moved to the bit, and as many weights
as their shape says."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus.backends import initial_weights
from copus.backends.huggingface import build_causal_lm, mean_loss
from copus.backends.megatron.attention import CausalAttention
from copus.backends.megatron.shard_table import shard_table
from copus.backends.step_contract import StepRequest
from tests.megatron_jobs import RULES, backend_of, configuration, random_batches, tiny_job
from tests.ranks import run_ranks

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {
        **{"norm": "layernorm", "bias": "all", "qk_norm": "head", "head_dim": 12, "positions": "learned"},
        **{"gated_mlp": False, "tied_embeddings": True, "norm_epsilon": 1e-6},
    },
    "qwen": {
        "bias": "qkv",
        "qk_norm": "head",
        "head_dim": 16,
        "kv_heads": 2,
        "tied_embeddings": True,
        "rope_base": 1e6,
    },
    "gemma": {
        **{"norm_position": "both", "qk_norm": "head", "activation": "gelu_tanh", "embedding_scale": 32**0.5},
        **{"attention_scale": 0.25, "sliding_window": 5, "full_attention_every": 2, "kv_heads": 2, "head_dim": 16},
    },
    "post-norm": {
        **{"norm_position": "post", "norm": "layernorm", "bias": "all"},
        **{"rope_scaling": {"kind": "yarn", "factor": 4, "original_seq_len": 8}, "activation": "gelu"},
    },
    "deepseek": {
        "latent_attention": {"query_rank": 12, "kv_rank": 12, "rope_dim": 4, "value_dim": 6},
        **{"head_dim": 12, "attention_scale": 0.3, "tied_embeddings": True},
        "rope_scaling": {"kind": "yarn", "factor": 4, "original_seq_len": 8, "attention_factor": 1.0},
    },
    "nemotron": {
        **{"gated_mlp": False, "activation": "squared_relu", "norm": "layernorm", "rope_fraction": 0.5},
        **{"rope_scaling": {"kind": "llama3", "factor": 8, "original_seq_len": 8}, "sliding_window": 6},
    },
}
LAYOUTS: list[dict[str, Any]] = [
    {"dp": 4},
    {"tp": 2, "dp": 2, "zero": 1},
    {"pp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "sequence_parallel": True},
    {"cp": 2, "tp": 2},
    {"tp": 2, "dp": 2, "sequence_parallel": True, "zero": 1},
    {"pp": 2, "vp": 2, "dp": 2, "zero": 1},
]
Figures = tuple[list[float], list[np.ndarray]]
"""Losses, and |g_j|² of the parts of the first step: those of micro-batches and those of norm layers."""


def _train(layout: dict[str, Any], model: dict[str, Any]) -> Figures:
    backend = backend_of(tiny_job(dist.get_world_size(), layout, model, micro_batch=2))
    results = [
        backend.train_step(random_batches, StepRequest(8 * step, RULES, "microbatch+normlayer")) for step in range(4)
    ]
    parts = (results[0].parts, results[0].norm_layer_parts)
    return [result.loss for result in results], [np.sort(kind.squared_norms) for kind in parts if kind is not None]


of_every_family = pytest.mark.parametrize(
    "family", ["gpt", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "gpt")]
)
"""One in the default suite: they take 10 s each."""


@pytest.mark.dist
@of_every_family
def test_losses_and_part_norms_do_not_depend_on_the_layout(family: str) -> None:
    model = FAMILIES[family]
    losses, parts = run_ranks(1, _train, {}, model)[0]
    assert losses[-1] < losses[0]
    for layout in ({"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"dp": 2}, {"cp": 2}):
        other_losses, other_parts = run_ranks(2, _train, layout, model)[0]
        np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
        for kind, other_kind in zip(parts, other_parts, strict=True):
            np.testing.assert_allclose(other_kind, kind, rtol=1e-5)


def _by_autograd(model: dict[str, Any]) -> list[float]:
    """|g_i|² of all norm layers' weights and biases for each sequence, by one backward pass a sequence."""
    network: Any = backend_of(tiny_job(1, {}, model, micro_batch=2)).built.chunks[0].module
    params = [param for name, param in network.named_parameters() if "norm" in name]
    squares = []
    for index in range(8):
        tokens, labels = random_batches(index, 1)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        loss = network(tokens, positions, None, labels=labels).mean()
        squares.append(sum(float(grad.double().square().sum()) for grad in torch.autograd.grad(loss, params)))
    return squares


def _by_both() -> list[tuple[np.ndarray, list[float]]]:
    return [(_train({}, model)[1][1], sorted(_by_autograd(model))) for model in FAMILIES.values()]


@pytest.mark.dist
def test_norm_layers_see_what_autograd_computes() -> None:
    for parts, expected in run_ranks(1, _by_both)[0]:
        np.testing.assert_allclose(parts, expected, rtol=1e-4)


AS_IN_TRANSFORMERS: list[dict[str, Any]] = [
    {"bias": "qkv", "head_dim": 12, "kv_heads": 2},
    {"bias": "all", "head_dim": 10},
    {"qk_norm": "head", "head_dim": 16},
    {"gated_mlp": False, "activation": "squared_relu", "norm_epsilon": 1e-3},
    {"activation": "gelu_tanh", "tied_embeddings": True},
    *(
        {"rope_scaling": {"kind": kind, "factor": 8, **({} if kind == "linear" else {"original_seq_len": 8})}}
        for kind in ("linear", "llama3", "yarn")
    ),
]


def _losses_of_both() -> list[tuple[float, float]]:
    """Of models with large weights, so that everything in them matters."""
    initial_weights._INIT_STD = 0.5
    pairs = []
    for model in [{}, *AS_IN_TRANSFORMERS]:
        job = tiny_job(1, {}, model, micro_batch=8)
        backend = backend_of(job)
        ours = backend.train_step(random_batches, StepRequest(0, RULES)).loss
        backend.close()
        theirs = build_causal_lm(job.model, torch.float32, torch.device("cpu"), job.training.seed)
        pairs.append((ours, mean_loss(theirs, *random_batches(0, 8)).item()))
    return pairs


@pytest.mark.dist
def test_megatron_computes_what_transformers_computes() -> None:
    (usual, _), *pairs = run_ranks(1, _losses_of_both)[0]
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert ours != pytest.approx(usual, rel=1e-3), "the fields make a difference"


@pytest.mark.parametrize(("layer", "attended"), [(1, 3), (2, 7), (3, 3), (4, 7)])
def test_a_layer_attends_to_its_window(layer: int, attended: int) -> None:
    config = SimpleNamespace(
        attention_dropout=0, kv_channels=4, softmax_scale=None, window_size=(2, 0), window_attn_skip_freq=2
    )
    states = torch.zeros(7, 1, 2, 4)  # equal scores: the mean of the values that are attended to
    values = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 1, 2, 4)
    output = CausalAttention(config, layer)(states, states, values, None)  # type: ignore[arg-type]
    expected = [sum(range(max(0, last + 1 - attended), last + 1)) / min(last + 1, attended) for last in range(7)]
    torch.testing.assert_close(output[:, 0, 0], torch.tensor(expected))


def test_attention_with_values_narrower_than_keys_keeps_no_scores() -> None:
    tokens, heads, width, value_width = 128, 4, 16, 8
    config = SimpleNamespace(attention_dropout=0, kv_channels=width, softmax_scale=None, window_size=None)
    config.window_attn_skip_freq = None
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(tokens, 1, heads, width, generator=generator, requires_grad=True) for _ in range(2))
    value = torch.randn(tokens, 1, heads, value_width, generator=generator, requires_grad=True)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = CausalAttention(config, 1)(query, key, value, None)  # type: ignore[arg-type]
    assert max(kept) < heads * tokens * tokens
    scores = torch.einsum("sbhw,tbhw->bhst", query, key) / width**0.5
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    expected = torch.einsum("bhst,tbhv->sbhv", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)
    torch.testing.assert_close(output, expected.reshape(tokens, 1, heads * value_width))


def _tour(model: dict[str, Any]) -> tuple[list[str], list[float]]:
    """What was not the same after the state went through all layouts, and the losses of a step in each of them."""
    backend = backend_of(tiny_job(dist.get_world_size(), LAYOUTS[0], model, micro_batch=2, precision="bf16"))
    losses = [backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss for step in range(2)]
    before = {place: tensor().clone() for place, tensor in backend.live_state().items()}
    for layout in [*LAYOUTS[1:], LAYOUTS[0]]:
        backend.move(configuration(8, 2, **layout))
    after = {place: tensor() for place, tensor in backend.live_state().items()}
    assert before.keys() == after.keys()
    changed = [str(place[0]) for place, tensor in before.items() if not torch.equal(tensor, after[place])]
    for number, layout in enumerate(LAYOUTS):
        backend.move(configuration(8, 2, **layout))
        losses.append(backend.train_step(random_batches, StepRequest(16 + 8 * number, RULES)).loss)
    return changed, losses


@pytest.mark.dist
@of_every_family
def test_a_move_through_seven_layouts_changes_no_bit(family: str) -> None:
    for changed, losses in run_ranks(4, _tour, FAMILIES[family]):
        assert changed == []
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_has_as_many_weights_as_the_shape_says(family: str) -> None:
    job = tiny_job(1, {}, FAMILIES[family])
    held = shard_table(job, job.training.layout).of_rank(0).values()
    assert sum(box.elements for field, box in held if "/" not in field.name) == job.model.parameters
