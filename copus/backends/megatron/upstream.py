"""Workarounds for defects of megatron-core 0.16 to 0.19, on CPU and GPU alike, with the upstream line and its
effect."""

from typing import Any

import torch

from copus.backends.megatron.versions import patch


def use_torch_adam() -> None:
    """Build torch's (fused) AdamW even if Transformer Engine or Apex is installed.

    optimizer/__init__.py:10-35 would then use FusedAdam, which keeps its step count in the parameter group instead of
    the state. With one optimizer on every machine there is one way to save, load and move its state.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    for owner, name, value in (
        (optimizer, "Adam", torch.optim.AdamW),
        (optimizer, "USING_PYTORCH_OPTIMIZER", True),
        (distrib_optimizer, "HAVE_APEX_OR_TE", False),
    ):
        patch(owner, name, value, oldest=(0, 16), newest=(0, 19))


def use_torch_router() -> None:
    """Let routers compute with torch, whether or not Transformer Engine is installed: `kernels: torch` is then the same
    everywhere.

    moe_utils.py:1192 asks whether `te_general_gemm` is None; in 0.16 there is no such name without Transformer Engine.
    """
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


def use_torch_latent_attention() -> None:
    """Let latent attention of 0.16 be built without Transformer Engine.

    multi_latent_attention.py:62 takes it for installed, since the module that wraps it can be imported, and :185 asks
    whether a projection is an instance of a mock.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.transformer import multi_latent_attention

    patch(multi_latent_attention, "HAVE_TE", HAVE_TE, oldest=(0, 16), newest=(0, 19))


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside megatron's chain of wrappers."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [wrapper.optimizer for wrapper in chained if wrapper.optimizer is not None]
