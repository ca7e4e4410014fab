"""A model that copus has no line about: LayerNorm, biases everywhere, and norms of queries and keys."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from copus.backends.megatron import model as megatron_model
from copus.backends.step_contract import StepRequest
from tests.megatron_jobs import RULES, backend_of, configuration, random_batches, tiny_job
from tests.ranks import run_ranks

LAYOUTS: list[dict[str, Any]] = [
    {"dp": 4},
    {"tp": 2, "dp": 2, "zero": 1},
    {"pp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "sequence_parallel": True},
    {"tp": 4, "zero": 1},
    {"pp": 2, "vp": 2, "tp": 2},
]


class LayerNorm(torch.nn.LayerNorm):
    """torch's, marked as megatron wants it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for param in self.parameters():
            param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def build_another_model() -> None:
    """From now on, in this process, jobs train that model."""
    config, spec = megatron_model.transformer_config, megatron_model.block_spec

    def transformer_config(*arguments: Any) -> Any:
        options = {"normalization": "LayerNorm", "add_bias_linear": True, "qk_layernorm": True}
        return dataclasses.replace(config(*arguments), **options)

    def block_spec(*arguments: Any) -> Any:
        block = spec(*arguments)
        block.layer_norm = LayerNorm
        for layer in block.layer_specs:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LayerNorm
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = LayerNorm
        return block

    megatron_model.transformer_config = transformer_config
    megatron_model.block_spec = block_spec


def small_buckets() -> None:
    """From now on, in this process, megatron's buckets have 4,000 elements or a little more."""
    megatron_model.DistributedDataParallelConfig = functools.partial(  # type: ignore[misc,assignment]
        megatron_model.DistributedDataParallelConfig, bucket_size=4000
    )


def _state(backend: Any) -> dict[Any, torch.Tensor]:
    return {place: tensor().clone() for place, tensor in backend.live_state().items()}


def _tour(precision: str, overlap: bool) -> tuple[list[str], list[str], list[float]]:
    """Names of what moves, those that were not the same after it went through all layouts, and the losses of steps in
    between."""
    build_another_model()
    small_buckets()
    layouts = LAYOUTS
    job = tiny_job(dist.get_world_size(), layouts[0], micro_batch=2, precision=precision, overlap_grad_reduce=overlap)
    backend = backend_of(job)
    losses = []
    for step in range(2):
        losses.append(backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss)
    before = _state(backend)
    for layout in [*layouts[1:], layouts[0]]:
        backend.move(configuration(8, 2, **layout))
    after = _state(backend)
    assert before.keys() == after.keys()
    changed = [place[0] for place, tensor in before.items() if not torch.equal(tensor, after[place])]
    for number, layout in enumerate(layouts):
        backend.move(configuration(8, 2, **layout))
        for step in range(3):
            losses.append(backend.train_step(random_batches, StepRequest(16 + 8 * (3 * number + step), RULES)).loss)
    return [name for name, _ in before], changed, losses


@pytest.mark.dist
@pytest.mark.parametrize(("precision", "overlap"), [("fp32", False), ("bf16", True)])
def test_it_moves_through_six_layouts_to_the_bit_and_learns(precision: str, overlap: bool) -> None:
    for names, changed, losses in run_ranks(4, _tour, precision, overlap):
        assert changed == []
        moved = {name.partition("layers.0.")[2] for name in names}
        assert {
            "self_attn.v_proj.bias",
            "self_attn.q_norm.bias/exp_avg",
            "mlp.gate_proj.bias",
            "input_layernorm.bias/exp_avg_sq",
        } <= moved
        assert losses[-1] < 0.9 * losses[0]


def _losses(layout: dict[str, Any]) -> list[float]:
    build_another_model()
    backend = backend_of(tiny_job(dist.get_world_size(), layout, micro_batch=2))
    return [backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss for step in range(4)]


@pytest.mark.dist
def test_its_losses_do_not_depend_on_the_layout() -> None:
    alone = run_ranks(1, _losses, {})[0]
    for layout in ({"tp": 2}, {"pp": 2, "vp": 2}):
        assert run_ranks(2, _losses, layout)[0] == pytest.approx(alone, rel=1e-4)
