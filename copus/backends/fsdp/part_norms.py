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
        self.watch()

    def watch(self) -> None:
        """Begin to see gradients, if that has not begun. The gathered parameters exist since the first forward pass,
        and stay the same objects."""
        if self._hooks:
            return
        for parameter in fsdp_parameters(self._built.model):
            if tensor_parallel_axis(parameter._param_fqn) is not None or self._built.tp_rank == 0:
                whole, of_one, of_all = parameter.unsharded_param, self._see, self._see_sum
                self._hooks.append(whole.register_hook(functools.partial(of_one, parameter)))
                self._hooks.append(whole.register_post_accumulate_grad_hook(functools.partial(of_all, parameter)))

    def _see(self, parameter: Any, gradient: torch.Tensor) -> None:
        """Runs when autograd has one micro-batch's whole gradient, before it is added to the others."""
        if self._is_measured() and not self._sums_microbatches:
            # A DTensor's gradient may be whole although the parameter is cut: the embedding's is.
            self._add(parameter._get_grad_inner_tensor(gradient))

    def _see_sum(self, parameter: Any, whole: torch.Tensor) -> None:
        """Runs when that gradient has been added to those of the earlier micro-batches, before FSDP reduces the sum.
        No sum is computed for the norm alone, except in bf16, whose gradients FSDP adds up in fp32 later."""
        if self._part is not None and self._sums_microbatches:
            total, before = parameter._get_grad_inner_tensor(whole.grad), parameter.unsharded_accumulated_grad
            self._add(total if before is None else total + parameter._get_grad_inner_tensor(before))

    def grad_sq_share(self, names: set[str] | None = None) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient."""
        return grad_sq_share(self._built, names)


def grad_sq_share(built: BuiltModel, names: set[str] | None = None) -> torch.Tensor:
    """This rank's share of |g|² of the step's mean gradient, of all parameters or of some: 0-d, float64."""
    counted = (
        sharded for sharded in built.parameters if sharded.is_counted and (names is None or sharded.name in names)
    )
    gradients = [sharded.gradient for sharded in counted]
    return sum_of_squares(norms(gradients), built.device)
