"""Squared norms of the gradients of the parts of a step, for a model that every replica holds whole: plain torch, and
DistributedDataParallel before it reduces."""

import functools

import torch

from copus.backends.part_norms import PartNorms
from copus.backends.squared_norms import norms, sum_of_squares
from planner.backend_traits import BackendTraits


class WholePartNorms(PartNorms):
    """Sees gradients at the model's parameters."""

    def __init__(self, model: torch.nn.Module, traits: BackendTraits, replica: int, device: torch.device) -> None:
        """`model` is the module itself, not what wraps it."""
        super().__init__(model, traits, replica, counts=True)
        self._device = device
        self._parameters = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._hooks = [param.register_hook(functools.partial(self._see, param)) for param in self._parameters.values()]

    def _see(self, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        """Runs when autograd has one micro-batch's whole gradient of a parameter, before it is added to the others."""
        if not self._is_measured():
            return
        if self._sums_microbatches and param.grad is not None:
            gradient = gradient + param.grad
        self._add(gradient)

    def grad_sq_share(self, names: set[str] | None = None) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient: all of it on the first replica."""
        counted = self._parameters.items() if self._replica == 0 else ()
        chosen = (param.grad for name, param in counted if names is None or name in names)
        return sum_of_squares(norms([gradient for gradient in chosen if gradient is not None]), self._device)
