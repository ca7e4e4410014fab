"""Squared norms of the gradients of the parts of a step, before FSDP reduces them.

Tensor parallel duplicates count on tensor rank 0.
"""

import functools
from typing import Any

import torch

from copus.backends.fsdp.built import BuiltModel, fsdp_parameters
from copus.backends.fsdp.description import FsdpDescription
from copus.backends.fsdp.shards import tensor_parallel_axis
from copus.backends.part_norms import PartNorms
from copus.backends.squared_norms import norms, sum_of_squares


class FsdpPartNorms(PartNorms):
    """Sees gradients at the gathered parameters."""

    def __init__(self, built: BuiltModel) -> None:
        super().__init__(built.model, FsdpDescription(), built.dp_rank, counts=built.tp_rank == 0)
        self._built = built

    def begin_backward(self, microbatch: int) -> None:
        """Say which micro-batch's gradients come next."""
        super().begin_backward(microbatch)
        if not self._hooks:  # the gathered parameters exist since the first forward pass, and stay the same objects
            for parameter in fsdp_parameters(self._built.model):
                if tensor_parallel_axis(parameter._param_fqn) is not None or self._built.tp_rank == 0:
                    hook = functools.partial(self._see, parameter)
                    self._hooks.append(parameter.unsharded_param.register_hook(hook))

    @torch.no_grad()
    def _see(self, parameter: Any, gradient: torch.Tensor) -> None:
        """Runs when autograd has one micro-batch's whole gradient, before it is added to the others."""
        if self._part is None:
            return
        # A DTensor's gradient may be whole where the parameter is cut: the embedding's is.
        local = parameter._get_grad_inner_tensor(gradient)
        if self._sums_microbatches:
            before = parameter.unsharded_accumulated_grad  # fp32, if that is not the precision of the model
            before = parameter.unsharded_param.grad if before is None else before
            local = local if before is None else local + parameter._get_grad_inner_tensor(before)
        self._add(local)

    def _norm_layers_grad_sq(self, names: set[str]) -> torch.Tensor:
        return grad_sq_share(self._built, names)


def grad_sq_share(built: BuiltModel, names: set[str] | None = None) -> torch.Tensor:
    """This rank's share of |g|² of the step's mean gradient, of all parameters or of some: 0-d, float64."""
    counted = (
        sharded for sharded in built.parameters if sharded.is_counted and (names is None or sharded.name in names)
    )
    gradients = [sharded.gradient for sharded in counted]
    return sum_of_squares(norms(gradients), built.device)
