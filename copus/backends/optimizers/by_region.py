"""An optimizer whose updates know which tensors of the state its parameters are parts of."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from copus.backends.optimizers.rounding import round_stochastically
from copus.backends.regions import HeldWeight, optimizer_state
from copus.optimizers import BatchRules


class ParameterStep(NamedTuple):
    """One step of one parameter."""

    weight: torch.Tensor
    """fp32, to be changed in place."""
    gradient: torch.Tensor
    """fp32, of the same shape; may be used up."""
    state: dict[str, torch.Tensor]
    """The statistics, fp32, to be changed in place."""
    held: HeldWeight
    """The tensors of the job's state that the parameter consists of."""
    optimizer: BatchRules
    """The optimizer of the job file."""
    options: dict[str, Any]
    """Learning rate, decay rates and the like, as they are in this step."""

    def decay_weight(self) -> None:
        """Decoupled weight decay (1711.05101)."""
        self.weight.mul_(1 - self.options["lr"] * self.options["weight_decay"])


Update = Callable[[ParameterStep], None]
"""Changes the weight and its state. Collective over the groups of the weight."""


class RegionOptimizer(torch.optim.Optimizer):
    """Updates one parameter after the other. A bf16 parameter is its own master: its update is made in fp32 and rounded
    stochastically, so that small changes are not lost."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        update: Update,
        held: Mapping[torch.nn.Parameter, HeldWeight],
        optimizer: BatchRules,
        seed: int,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": (0.0, 0.0), "weight_decay": 0.0, "steps": 0, "correction": 1.0})
        self._update, self._held, self._optimizer, self._seed = update, held, optimizer, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make a step from the gradients that are there."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                held = self._held[param]
                state = optimizer_state(self, param, held.statistic_shapes(self._optimizer))
                weight = param.data.float()
                self._update(ParameterStep(weight, param.grad.float(), state, held, self._optimizer, group))
                if param.dtype != torch.float32:
                    round_stochastically(weight, param.data, held, self._seed, group["steps"])
