"""Squared norms of the gradients of the parts of a step, before FSDP reduces them.

A part is a micro-batch of one replica (`microbatch`), all that one replica does in the step (`replica`), or a sequence
seen by the norm layers alone (`normlayer`). ZeRO-2 and 3 reduce the gradient of every micro-batch: a replica that has
several of them never has its own sum, and is no part. Tensor parallel duplicates count on tensor rank 0.
"""

import functools
from typing import Any

import numpy as np
import torch

from copus.backends.fsdp.built import BuiltModel, fsdp_parameters
from copus.backends.fsdp.description import FsdpDescription
from copus.backends.fsdp.shards import tensor_parallel_axis
from copus.backends.norm_layers import NormLayers
from copus.backends.squared_norms import norms, sum_of_squares
from copus.backends.step_contract import Parts
from planner.noise_sources import REPLICA, split
from profiles.configuration import Configuration


class PartNorms:
    """Collects the squared norms of the parts of each step. Made once for a built model, and closed with it.

    Use: `start` before the first micro-batch, `begin_backward` before the backward pass of each, `contribution` after
    the last, and `parts` with the sum of the contributions of all ranks.
    """

    def __init__(self, built: BuiltModel) -> None:
        self._built = built
        self._norm_layers = NormLayers(built.model, counts=built.tp_rank == 0)
        self._hooks: list[Any] = []
        self._full_parts = 0

    def close(self) -> None:
        """Remove all hooks: they and the model keep each other."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._norm_layers.close()

    def start(self, source: str | None, configuration: Configuration) -> None:
        """Begin a step. What the configuration has no two parts of is not measured."""
        full, norm_layers = split(source)
        replicas = configuration.layout.dp
        self._configuration = configuration
        self._sums_microbatches = full == REPLICA
        parts = FsdpDescription().parts(configuration)
        number = parts[full].number if full in parts else 0
        self._full_parts = number // replicas if number > 1 else 0
        """Of this replica."""
        self._norm_layers_on = norm_layers and configuration.global_batch > 1
        self._norm_layers.start(self._norm_layers_on)
        self._norms: list[list[torch.Tensor]] = [[] for _ in range(self._full_parts)]

    def begin_backward(self, microbatch: int) -> None:
        """Say which micro-batch's gradients come next."""
        self._part: int | None = microbatch if self._full_parts else None
        if self._full_parts and self._sums_microbatches:
            self._part = 0 if microbatch == self._configuration.num_microbatches - 1 else None
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
        self._norms[self._part] += norms([local])

    @torch.no_grad()
    def contribution(self) -> torch.Tensor:
        """This rank's share of what the whole world has to add up: a float64 vector, of one length on all ranks.

        |g|² of the norm layers' mean gradient, then |g_j|² of every part of the full source, then of every sequence.
        """
        built, configuration = self._built, self._configuration
        replicas = configuration.layout.dp
        sequences = configuration.global_batch // replicas if self._norm_layers_on else 0
        vector = torch.zeros(1 + replicas * (self._full_parts + sequences), dtype=torch.float64, device=built.device)
        if self._full_parts:
            sums = torch.stack([sum_of_squares(part, built.device) for part in self._norms])
            scale = (
                1 if self._sums_microbatches else configuration.num_microbatches
            )  # every loss is divided by their number
            vector[1 + built.dp_rank * self._full_parts :][: self._full_parts] = sums * scale**2
        if sequences:
            vector[0] = grad_sq_share(built, self._norm_layers.names)
            start = 1 + replicas * self._full_parts + built.dp_rank * sequences
            vector[start:][:sequences] = self._norm_layers.collect(
                configuration.num_microbatches, configuration.micro_batch, built.device
            )
        self._norms = []
        return vector

    def parts(self, totals: np.ndarray, grad_sq: float) -> tuple[Parts | None, Parts | None]:
        """The parts of the full source and those of the norm layers, from the sum of all ranks' contributions and |g|²
        of the whole step."""
        batch = self._configuration.global_batch
        count = self._full_parts * self._configuration.layout.dp
        full = Parts(totals[1 : 1 + count], batch // count, grad_sq) if count else None
        norm_layers = Parts(totals[1 + count :], 1, float(totals[0])) if self._norm_layers_on else None
        return full, norm_layers


def grad_sq_share(built: BuiltModel, names: set[str] | None = None) -> torch.Tensor:
    """This rank's share of |g|² of the step's mean gradient, of all parameters or of some: 0-d, float64."""
    counted = (
        sharded for sharded in built.parameters if sharded.is_counted and (names is None or sharded.name in names)
    )
    gradients = [sharded.gradient for sharded in counted]
    return sum_of_squares(norms(gradients), built.device)
