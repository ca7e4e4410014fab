"""Squared norms of the gradients of the parts of a step, for backends whose every gradient is whole on its replica.

A part is a micro-batch of one replica (`microbatch`), all that one replica does in the step (`replica`), or a sequence
seen by the norm layers alone (`normlayer`). The backend's description says which parts a configuration has.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from copus.backends.description import BackendDescription
from copus.backends.norm_layers import NormLayers, rms_norms
from copus.backends.squared_norms import norms, sum_of_squares
from copus.backends.step_contract import Parts
from planner.noise_sources import REPLICA, split
from profiles.configuration import Configuration


class PartNorms(ABC):
    """Collects the squared norms of the parts of each step. Made once for a built model, and closed with it.

    Use: `start` before the first micro-batch, `begin_backward` before the backward pass of each, `contribution` after
    the last, and `parts` with the sum of the contributions of all ranks. A backend's hooks see every gradient before it
    is added to those of earlier micro-batches, and hand it to `_add`.
    """

    def __init__(self, model: Any, description: BackendDescription, replica: int, counts: bool) -> None:
        """`replica` is this rank's number among the data parallel ones. Of the ranks that see the same norm layers one
        `counts`."""
        self._norm_layers = NormLayers(rms_norms(model), sequence_axis=0, counts=counts)
        self._description = description
        self._replica = replica
        self._hooks: list[Any] = []
        self._full_parts = 0
        self._part: int | None = None
        """The part that the gradients of this backward pass belong to; None if they are not measured."""

    @abstractmethod
    def _norm_layers_grad_sq(self, names: set[str]) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient, of the norms' weights: 0-d, float64."""

    def close(self) -> None:
        """Remove all hooks: they and the model keep each other."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._norm_layers.close()

    def start(self, source: str | None, configuration: Configuration) -> None:
        """Begin a step. What the configuration has no two parts of is not measured."""
        full, norm_layers = split(source)
        self._configuration = configuration
        self._sums_microbatches = full == REPLICA
        parts = self._description.parts(configuration)
        number = parts[full].number if full in parts else 0
        self._full_parts = number // configuration.layout.dp if number > 1 else 0
        """Of this replica."""
        self._norm_layers_on = norm_layers and configuration.global_batch > 1
        self._norm_layers.start(self._norm_layers_on)
        self._norms: list[list[torch.Tensor]] = [[] for _ in range(self._full_parts)]

    def begin_backward(self, microbatch: int) -> None:
        """Say which micro-batch's gradients come next."""
        self._part = microbatch if self._full_parts else None
        if self._full_parts and self._sums_microbatches:
            self._part = 0 if microbatch == self._configuration.num_microbatches - 1 else None

    def _add(self, gradient: torch.Tensor) -> None:
        """Count a gradient for the part of this backward pass."""
        assert self._part is not None, "it is measured"
        self._norms[self._part] += norms([gradient])

    @torch.no_grad()
    def contribution(self, device: torch.device) -> torch.Tensor:
        """This rank's share of what the whole world has to add up: a float64 vector, of one length on all ranks.

        |g|² of the norm layers' mean gradient, then |g_j|² of every part of the full source, then of every sequence.
        """
        self._part = None
        configuration, replica = self._configuration, self._replica
        replicas, count = configuration.layout.dp, configuration.num_microbatches
        sequences = configuration.global_batch // replicas if self._norm_layers_on else 0
        vector = torch.zeros(1 + replicas * (self._full_parts + sequences), dtype=torch.float64, device=device)
        if self._full_parts:
            sums = torch.stack([sum_of_squares(part, device) for part in self._norms])
            scale = 1 if self._sums_microbatches else count  # the loss of every micro-batch is divided by their number
            vector[1 + replica * self._full_parts :][: self._full_parts] = sums * scale**2
        if sequences:
            vector[0] = self._norm_layers_grad_sq(self._norm_layers.names)
            first = 1 + replicas * self._full_parts + replica * sequences
            vector[first:][:sequences] = self._norm_layers.collect(count, configuration.micro_batch, device)
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
