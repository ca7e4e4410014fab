"""Squared norms of the gradients of the parts of a step, before DeepSpeed reduces them."""

import functools
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from copus.backends.deepspeed.description import DeepSpeedDescription
from copus.backends.deepspeed.gradients import NORMS, fp32_accumulators, reduced_gradients
from copus.backends.part_norms import PartNorms
from copus.backends.squared_norms import norms, sum_of_squares
from profiles.configuration import Configuration

if TYPE_CHECKING:
    from copus.backends.deepspeed.built import BuiltModel


class DeepSpeedPartNorms(PartNorms):
    """Sees gradients at the model's parameters."""

    def __init__(self, built: "BuiltModel") -> None:
        super().__init__(built.model, DeepSpeedDescription(), dist.get_rank(), counts=True)
        self._built = built
        for number, group in enumerate(built.groups):
            for index, param in enumerate(group.values()):
                self._hooks.append(param.register_hook(functools.partial(self._see, number, index)))
                self._hooks.append(param.register_post_accumulate_grad_hook(self._see_sum))

    def start(self, source: str | None, configuration: Configuration) -> None:
        """Begin a step."""
        super().start(source, configuration)
        needs_sum = self._sums_microbatches and configuration.num_microbatches > 1
        self._accumulators = fp32_accumulators(self._built) if needs_sum else None
        self._sum_is_there = needs_sum and self._accumulators is None
        """Whether autograd makes the sum: then no other is made for the norm alone."""

    def _see(self, group: int, index: int, gradient: torch.Tensor) -> None:
        """Runs when autograd has one micro-batch's whole gradient of a parameter, before it is added to the others."""
        if not self._is_measured() or self._sum_is_there:
            return
        if self._accumulators is not None:
            before = self._accumulators[group][index]
            gradient = gradient.to(before.dtype) + before.view(gradient.shape)
        self._add(gradient)

    def _see_sum(self, param: torch.Tensor) -> None:
        """Runs when that gradient has been added to those of the earlier micro-batches. If DeepSpeed reduces during the
        backward pass, its hook has run before and put the gradient into a bucket, which is reduced later."""
        if self._part is not None and self._sum_is_there:
            assert param.grad is not None, "it has just been added to"
            self._add(param.grad)

    def grad_sq_share(self, names: set[str] | None = None) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient, of all parameters or of the norms, which are the only
        ones that it tells apart."""
        group = None if names is None else NORMS
        return sum_of_squares(norms(reduced_gradients(self._built, group)), self._built.device)
