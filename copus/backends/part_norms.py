"""Squared norms of the gradients of the parts of a step, for backends whose every gradient is whole on its replica.

A part is a micro-batch of one replica (`microbatch`), all that one replica does in the step (`replica`), or a sequence
seen by the norm layers alone (`normlayer`). The backend's description says which parts a configuration has.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from copus.backends.norm_layers import NormLayers, norms_of
from copus.backends.squared_norms import norms, sum_of_squares
from copus.backends.step_contract import Parts
from planner.backend_traits import BackendTraits
from planner.noise_sources import REPLICA, split
from profiles.configuration import Configuration


class PartNorms(ABC):
    """Collects the squared norms of the parts of each step. Made once for a built model, and closed with it.

    Use: `start` before the first micro-batch, `begin_backward` before the backward pass of each, `contribution` after
    the last, and `parts` with the sum of the contributions of all ranks. Hooks see every gradient before it is added to
    those of earlier micro-batches; they ask `_is_measured`, and hand it to `_add`. Autograd runs hooks
    without recording; to say so again in each would take longer than all that they do in a step that is not measured.

    In a training loop that is not ours nobody calls `begin_backward`: there `count_passes` lets the gradients say it.
    """

    def __init__(self, model: Any, traits: BackendTraits, replica: int, counts: bool) -> None:
        """`replica` is this rank's number among the data parallel ones. Of the ranks that see the same norm layers one
        `counts`."""
        self._norm_layers = NormLayers(norms_of(model), sequence_axis=0, counts=counts)
        self._traits = traits
        self._replica = replica
        self._hooks: list[Any] = []
        self._full_parts = 0
        self._sums_microbatches = False
        self._part: int | None = None
        """The part that the gradients of this backward pass belong to; None if they are not measured."""
        self.passes = 0
        """Backward passes of this step, if they are counted."""
        self._after_pass: Callable[[], None] | None = None
        self._in_pass = False

    @abstractmethod
    def grad_sq_share(self, names: set[str] | None = None) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient, of all parameters or of those named: 0-d, float64."""

    @property
    def has_norm_layers(self) -> bool:
        """Whether the model has norms that can be measured."""
        return bool(self._norm_layers.names)

    def count_passes(self, after_pass: Callable[[], None]) -> None:
        """Take every backward pass for a micro-batch, and call `after_pass` when it is over, gradients reduced."""
        self._after_pass = after_pass

    def close(self) -> None:
        """Remove all hooks: they and the model keep each other."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._norm_layers.close()

    def start(self, source: str | None, configuration: Configuration) -> None:
        """Begin a step. What the configuration has no two parts of is not measured."""
        full, norm_layers = split(source)
        self.passes = 0
        self._configuration = configuration
        self._sums_microbatches = full == REPLICA
        parts = self._traits.parts(configuration)
        number = parts[full].number if full in parts else 0
        self._full_parts = number // configuration.layout.dp if number > 1 else 0
        """Of this replica."""
        self._norm_layers_on = norm_layers and configuration.global_batch > 1
        self._norm_layers.start(self._norm_layers_on)
        self._norms: list[list[torch.Tensor]] = [[] for _ in range(self._full_parts)]

    def begin_backward(self, microbatch: int) -> None:
        """Say which micro-batch's gradients come next."""
        self._part = microbatch if self._full_parts else None
        if self._full_parts:
            last = self._configuration.num_microbatches - 1
            if self._sums_microbatches:
                self._part = 0 if microbatch == last else None
            elif microbatch > last:  # of a loop that makes more of them than it said
                self._part = None

    def _is_measured(self) -> bool:
        """Whether the gradients of this backward pass are. Called by the hook of every gradient, first of all."""
        if self._after_pass is not None and not self._in_pass:
            self._in_pass = True
            self.begin_backward(self.passes)
            _at_end_of_pass(self._end_pass)
        return self._part is not None

    def _end_pass(self) -> None:
        # Frameworks reduce what is left to reduce in callbacks of the same kind. Those were queued before this one is.
        assert self._after_pass is not None, "passes are counted"
        self._in_pass = False
        self._part = None
        self.passes += 1
        _at_end_of_pass(self._after_pass)

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
            vector[0] = self.grad_sq_share(self._norm_layers.names)
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


def _at_end_of_pass(function: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that is under way, after what was queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
