"""Where an engine of DeepSpeed has its gradients. Imports nothing of DeepSpeed, so that `copus.NoiseMeter` can measure
somebody's own engine and leave everything else as it is."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from copus.backends.deepspeed.built import BuiltModel

MATRICES, NORMS, BIASES = 0, 1, 2
"""The groups of parameters. Only matrices decay; a model without biases has no third group."""


def reduced_gradients(built: "BuiltModel", group: int | None = None) -> list[torch.Tensor]:
    """The averaged gradients that this rank counts, of all groups of parameters or of one: its share, or on rank 0 all
    of them if nothing is shared out."""
    chosen = range(len(built.groups)) if group is None else (group,)
    wrapper = built.zero_optimizer
    if built.layout.zero == 0:
        counts = dist.get_rank() == 0
        params = (param for number in chosen for param in built.groups[number].values())
        return [param.grad for param in params if counts and param.grad is not None]
    if built.layout.offload_optimizer:
        gradients = (built.flat_masters[number].grad for number in chosen)
        return [gradient for gradient in gradients if gradient is not None]
    if hasattr(wrapper, "fp32_groups_gradient_flat_partition"):  # bf16 with ZeRO 1
        return [wrapper.fp32_groups_gradient_flat_partition[number] for number in chosen]
    return [gradient for number in chosen for gradient in wrapper.averaged_gradients[number]]


def fp32_accumulators(built: "BuiltModel") -> list[list[torch.Tensor]] | None:
    """Where DeepSpeed adds up the gradients of micro-batches before any reduction, by group and index of the parameter;
    None if autograd adds them up in the parameters' own, as without bf16. ZeRO 0 and 1."""
    accumulators: list[list[torch.Tensor]] | None = getattr(built.zero_optimizer, "fp32_groups_gradients", None)
    return accumulators
