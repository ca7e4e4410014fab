"""What the loop asks of one optimizer step, and what a backend answers.

`Backend.train_step` (`copus/backends/base.py`) brings them together: gradients give `StepShares`, one all-reduce of
all ranks' shares gives `StepResult`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from copus.expert_load import ExpertLoad

Batches = Callable[[int, int], tuple[torch.Tensor, ...]]
"""(first sample, how many) → tokens and labels, int64 of shape (how many, seq_len) each; and, if attention or positions
begin anew with each document, the positions of the tokens and the numbers of the documents that they attend within."""

NOT_COUNTED = -100
"""Label of a token whose loss does not count. A backend takes it for a loss of 0, and still divides by all tokens:
`Backend` makes the mean over those that count of it."""


@dataclass(frozen=True)
class Parts:
    """Norms of the parts whose mean is the step's gradient; the input of the noise estimate."""

    squared_norms: np.ndarray
    """|g_j|² of each part's mean gradient, float64 of shape (J,)."""
    part_size: int
    """n, sequences in each part."""
    grad_sq: float
    """|g|² of the mean of the parts, in the same coordinates as `squared_norms`: all weights, some weights, or all
    divided by Adam's √v̂."""


@dataclass(frozen=True)
class StepRules:
    """Hyperparameters of one optimizer step; all of them change with the batch."""

    lr: float
    """Learning rate."""
    betas: tuple[float, float]
    """Adam's β1 and β2."""
    weight_decay: float | None = None
    """Decoupled weight decay; None for the job file's."""
    beta2_product: float | None = None
    """Π β2 over the optimizer steps before this one, 1 before the first; None if β2 never changed."""

    def beta2_product_before(self, optimizer_steps: int) -> float:
        """Π β2 over the `optimizer_steps` steps so far."""
        return self.betas[1] ** optimizer_steps if self.beta2_product is None else self.beta2_product


@dataclass(frozen=True)
class StepRequest:
    """The loop's request for one optimizer step."""

    first_sample: int
    """Index of the first sample of the global batch."""
    rules: StepRules
    noise_source: str | None = None
    """The parts to measure, by a name of `planner.noise_sources`; None for none."""
    stop: bool = False
    """Whether this rank asks to stop."""
    writing: bool = False
    """Whether this rank still writes a checkpoint."""
    save: bool = False
    """Whether this rank asks for a checkpoint."""
    on_trial: bool = False
    """Whether the step must be undoable on all ranks if any rank runs out of memory."""


@dataclass(frozen=True)
class StepShares:
    """One rank's summands of the figures of a step: their sum over all ranks are the figures. float64, on the device of
    the backend."""

    loss: torch.Tensor
    """Share of the mean training loss over all labels of the global batch, nats per token. One element."""
    grad_sq: torch.Tensor
    """Share of |g|², the squared norm of the mean gradient before clipping. One element."""
    parts: torch.Tensor
    """Share of the vector that `Backend.read_parts` reads; of the same length on all ranks, which may be 0."""
    expert_tokens: torch.Tensor | None = None
    """Tokens that each expert of each layer got, of shape (layers with experts, experts); None for a dense model."""


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step; equal on every rank."""

    loss: float
    """Mean training loss over the labels of the global batch that count, nats per token."""
    grad_sq: float
    """|g|², squared norm of the mean gradient before clipping."""
    parts: Parts | None
    """Micro-batches or replicas, if they were requested and there are at least two."""
    norm_layer_parts: Parts | None
    """Sequences in the coordinates of the norm layers' weights, if they were requested and there are at least two."""
    skipped: bool
    """True if the gradient was not finite; the weights are unchanged then."""
    stop: bool
    """True if any rank asked to stop."""
    writing: bool = False
    """True if any rank still writes a checkpoint."""
    expert_load: ExpertLoad | None = None
    """How the tokens of the step spread over the experts; None for a dense model."""
    save: bool = False
    """True if any rank asked for a checkpoint."""
