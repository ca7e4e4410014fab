"""Updates in the backward pass (LOMO, 2306.09782): every weight as soon as FSDP has its gradient, which is then freed.

So there are never gradients of more than a layer, beside those of the output layer.
"""

import functools
import math
from typing import Any

import torch

from copus.backends.fsdp.built import BuiltModel, ShardedParameter
from copus.backends.squared_norms import norms, sum_of_squares


class BackwardUpdates:
    """Updates a built model on its one rank. Use: `start` before the backward pass, `finish` after it; without `start`
    gradients stay for `update_weights`. FSDP calls the hooks of a weight when its gradient is reduced.

    From the first gradient on that is not finite a step updates nothing. Later layers, whose gradients came before it,
    stay updated: a step that is skipped whole has to hold all gradients.
    """

    def __init__(self, built: BuiltModel) -> None:
        self._built = built
        self._starts = self._goes_on = False
        self._scale = 1.0
        self._grad_sq = torch.zeros((), dtype=torch.float64, device=built.device)
        self._hooks = [
            sharded.parameter.register_post_accumulate_grad_hook(functools.partial(self._update, sharded))
            for sharded in built.parameters
        ]

    def close(self) -> None:
        """Remove the hooks: they and the model keep each other."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def start(self, options: dict[str, Any], scale: float) -> None:
        """Update in the backward pass that comes, with the gradients times `scale`."""
        self._built.set_options(options)
        self._starts = self._goes_on = True
        self._scale = scale
        self._grad_sq.zero_()

    def finish(self) -> torch.Tensor | None:
        """End a step: |g|², before `scale`, 0-d float64; None if it was not started."""
        started, self._starts = self._starts, False
        return self._grad_sq.clone() if started else None

    def _update(self, sharded: ShardedParameter, parameter: torch.Tensor) -> None:
        if not self._starts:
            return
        gradient, optimizer = sharded.gradient, self._built.optimizer
        assert optimizer is not None, "it is built"
        own = sum_of_squares(norms([gradient]), self._built.device)
        self._grad_sq += own
        self._goes_on = self._goes_on and math.isfinite(float(own) * self._scale**2)
        if self._goes_on:
            sharded.main.grad = gradient.mul_(self._scale) if self._scale != 1 else gradient
            optimizer.step()  # of the only weight that has a gradient
        parameter.grad = sharded.main.grad = None
