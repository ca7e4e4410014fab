"""Squared norms of the gradients of the parts of a step, before DeepSpeed reduces them."""

import functools

import torch
import torch.distributed as dist

from copus.backends.deepspeed.built import NORMS, BuiltModel, reduced_gradients
from copus.backends.deepspeed.description import DeepSpeedDescription
from copus.backends.part_norms import PartNorms
from copus.backends.squared_norms import norms, sum_of_squares


class DeepSpeedPartNorms(PartNorms):
    """Sees gradients at the model's parameters."""

    def __init__(self, built: BuiltModel) -> None:
        super().__init__(built.model, DeepSpeedDescription(), dist.get_rank(), counts=True)
        self._built = built
        self._hooks = [
            param.register_hook(functools.partial(self._see, number, index, param))
            for number, group in enumerate(built.groups)
            for index, param in enumerate(group.values())
        ]

    @torch.no_grad()
    def _see(self, group: int, index: int, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        """Runs when autograd has one micro-batch's whole gradient of a parameter, before it is added to the others."""
        if self._part is None:
            return
        if self._sums_microbatches and self._configuration.num_microbatches > 1:
            before = self._built.accumulated_gradient(group, index, param)
            gradient = gradient.to(before.dtype) + before.view(gradient.shape)
        self._add(gradient)

    def _norm_layers_grad_sq(self, names: set[str]) -> torch.Tensor:
        return sum_of_squares(norms(reduced_gradients(self._built, NORMS)), self._built.device)
