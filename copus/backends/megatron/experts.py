"""Mixtures of experts: Megatron's settings and layer of them, how tokens spread over the experts, and their biases."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from profiles.layout import Layout
from profiles.model_shape import ModelShape

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.backends import BackendSpecProvider  # noqa: E402
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend  # noqa: E402
from megatron.core.transformer import ModuleSpec  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402


def expert_options(model: ModelShape, layout: Layout, dispatcher: str, *, grouped: bool) -> dict[str, Any]:
    """What Megatron's configuration says of the experts of a model; nothing for a dense one. `grouped` as in
    `expert_spec`."""
    if not model.experts:
        return {}
    router = model.router
    over = {"sequence": "seq_aux_loss", "micro-batch": "aux_loss"}[router.aux_loss_over]
    return {
        "num_moe_experts": model.experts,
        "moe_ffn_hidden_size": model.expert_width,
        "moe_shared_expert_intermediate_size": model.shared_expert_hidden or None,
        "moe_layer_freq": [int(layer >= model.dense_layers) for layer in range(model.layers)],
        "moe_router_topk": model.experts_per_token,
        "moe_router_score_function": router.scores,
        # The softmax before the choice of experts, or after it: then their weights add up to 1.
        "moe_router_pre_softmax": not router.normalized or model.experts_per_token == 1,
        "moe_router_topk_scaling_factor": router.scale if router.scale != 1 else None,
        "moe_router_num_groups": router.groups if router.groups > 1 else None,
        "moe_router_group_topk": router.groups_per_token if router.groups > 1 else None,
        "moe_router_enable_expert_bias": router.bias_update_rate > 0,
        # Megatron would update the biases with the gradients, before it is known whether the step counts:
        # `ExpertTokens.update_biases` does it.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_load_balancing_type": over if router.aux_loss else "none",
        "moe_aux_loss_coeff": router.aux_loss,
        "moe_z_loss_coeff": router.z_loss or None,
        "moe_router_dtype": "fp32",
        "moe_expert_capacity_factor": model.capacity_factor,
        "moe_token_dispatcher_type": dispatcher,
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def expert_spec(model: ModelShape, provider: BackendSpecProvider, *, grouped: bool) -> ModuleSpec:
    """Megatron's layer of a router, experts that run one after the other or in grouped products, and a shared
    expert."""
    return get_moe_module_spec_for_backend(provider, model.experts, moe_grouped_gemm=grouped)


def is_shared_out(param: torch.Tensor) -> bool:
    """Whether expert parallel ranks have different experts in this parameter (layers.py:886)."""
    return not getattr(param, "allreduce", True)


def routers(chunks: list[Any]) -> Iterator[TopKRouter]:
    """The routers of this rank."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                yield module


class ExpertTokens:
    """Counts the tokens that the experts of this rank's layers get in a step, from the routers of this rank: those of
    its own sequences, and of its part of them with sequence parallelism."""

    def __init__(self, chunks: list[Any], model: ModelShape) -> None:
        self._model = model
        self._routers = list(routers(chunks))
        self._hooks = [router.register_forward_hook(self._after_routing) for router in self._routers]
        self._counts: dict[TopKRouter, torch.Tensor] = {}

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def start(self) -> None:
        """Begin a step."""
        self._counts = {}

    def _after_routing(self, router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if not torch.is_grad_enabled():  # an evaluation, or the first of the two passes of recomputation
            return
        count = output[1].sum(dim=0)  # of the tokens × experts that are True
        before = self._counts.get(router)
        self._counts[router] = count if before is None else before + count

    def contribution(self, device: torch.device) -> torch.Tensor | None:
        """This rank's summands: float64 of shape (layers with experts, experts). None for a dense model."""
        if not self._model.experts:
            return None
        shape = (self._model.expert_layers, self._model.experts)
        tokens = torch.zeros(shape, dtype=torch.float64, device=device)
        for router, count in self._counts.items():
            tokens[router.layer_number - 1 - self._model.dense_layers] += count
        return tokens

    @torch.no_grad()
    def update_biases(self) -> None:
        """Raise the biases of experts that got fewer tokens than the mean in this step, and lower those of the others
        (2408.15664, algorithm 1). Collective over the ranks of a pipeline stage."""
        if not self._model.router.bias_update_rate or not self._routers:
            return
        tokens = torch.stack([self._counts[router] for router in self._routers]).float()
        dist.all_reduce(tokens, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        steps = self._model.router.bias_update_rate * torch.sign(tokens.mean(dim=1, keepdim=True) - tokens)
        for router, step in zip(self._routers, steps, strict=True):
            router.expert_bias += step
