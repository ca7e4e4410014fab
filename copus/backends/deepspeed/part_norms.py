"""Squared norms of the gradients of the parts of a step, before DeepSpeed reduces them."""

import functools
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from copus.backends.deepspeed.description import DeepSpeedDescription
from copus.backends.deepspeed.gradients import NORMS, accumulated_gradient, reduced_gradients
from copus.backends.part_norms import PartNorms
from copus.backends.squared_norms import norms, sum_of_squares

if TYPE_CHECKING:
    from copus.backends.deepspeed.built import BuiltModel


class DeepSpeedPartNorms(PartNorms):
    """Sees gradients at the model's parameters."""

    def __init__(self, built: "BuiltModel") -> None:
        super().__init__(built.model, DeepSpeedDescription(), dist.get_rank(), counts=True)
        self._built = built
        self._hooks = [
            param.register_hook(functools.partial(self._see, number, index, param))
            for number, group in enumerate(built.groups)
            for index, param in enumerate(group.values())
        ]

    def _see(self, group: int, index: int, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        """Runs when autograd has one micro-batch's whole gradient of a parameter, before it is added to the others."""
        if not self._is_measured():
            return
        if self._sums_microbatches and self._configuration.num_microbatches > 1:
            before = accumulated_gradient(self._built, group, index, param)
            gradient = gradient.to(before.dtype) + before.view(gradient.shape)
        self._add(gradient)

    def grad_sq_share(self, names: set[str] | None = None) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient, of all parameters or of the norms, which are the only
        ones that it tells apart."""
        group = None if names is None else NORMS
        return sum_of_squares(norms(reduced_gradients(self._built, group)), self._built.device)
