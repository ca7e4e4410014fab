"""What a training framework has to offer. The loop, the profiler and the planner know this and nothing more."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from profiles.configuration import Configuration
from profiles.measurement import Fingerprint

Batches = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""(first sample, how many) → tokens and labels, int64 of shape (how many, seq_len)."""


@dataclass(frozen=True)
class Parts:
    """The parts that a step's gradient is the mean of, as the noise estimate needs them."""

    squared_norms: np.ndarray
    """|g_j|² of each part's mean gradient, float64 of shape (J,)."""
    part_size: int
    """n, sequences in each part."""
    grad_sq: float
    """|g|² of the mean of the parts, in the same coordinates: the step's own, or that of some weights, or divided by
    Adam's √v̂."""


@dataclass(frozen=True)
class StepRules:
    """What holds for one optimizer step; all of it changes with the batch."""

    lr: float
    """Learning rate."""
    betas: tuple[float, float]
    """Adam's β1 and β2."""
    weight_decay: float | None = None
    """Decoupled weight decay; None for that of the job file."""
    beta2_product: float | None = None
    """Π β2 over the optimizer steps before this one, 1 before the first; None if β2 was always as it is now."""

    def beta2_product_before(self, optimizer_steps: int) -> float:
        """Π β2 over the `optimizer_steps` steps so far."""
        return self.betas[1] ** optimizer_steps if self.beta2_product is None else self.beta2_product


@dataclass(frozen=True)
class StepRequest:
    """What is asked of one optimizer step."""

    first_sample: int
    """Where its global batch begins."""
    rules: StepRules
    noise_source: str | None = None
    """What parts to show: a name as in `copus.noise.sources`, or None for none."""
    stop: bool = False
    """Whether this rank asks to stop."""
    writing: bool = False
    """Whether this rank still writes a checkpoint."""
    on_trial: bool = False
    """Whether all ranks are to be able to go back where memory runs out on any."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step showed; equal on every rank."""

    loss: float
    """Mean training loss over the global batch, nats a token."""
    grad_sq: float
    """|g|², squared norm of the mean gradient before clipping."""
    parts: Parts | None
    """Micro-batches or replicas, where they were asked for and there are at least two."""
    norm_layer_parts: Parts | None
    """Sequences seen by the norm layers' weights alone, where they were asked for and there are at least two."""
    skipped: bool
    """True where the gradient was not finite: the optimizer did nothing."""
    stop: bool
    """True where any rank asked to stop."""
    writing: bool = False
    """True where any rank still writes a checkpoint."""


@dataclass
class TrainerState:
    """What goes into a checkpoint beside weights and optimizer state."""

    samples_consumed: int = 0
    step: int = 0
    data: str = ""
    """Digest of the prepared data that it was trained on."""
    optimizer_steps: int = 0
    """Optimizer steps that were not skipped: Adam's own count."""
    next_lr: float | None = None
    """Learning rate that the next step would have had when this was saved; None in older checkpoints."""
    skipped_in_a_row: int = 0
    """Steps up to now, in a row, whose gradients were not finite."""
    proven_samples: int = 0
    """Sequences trained on before the last step whose gradients were finite: a checkpoint with more of them may hold
    weights that are useless."""
    noise: dict[str, Any] = field(default_factory=dict)
    """State of the noise estimate."""
    norms: list[float] = field(default_factory=list)
    """Norms of the steps since the last decision."""
    planner: dict[str, Any] = field(default_factory=dict)
    """What the planner knows of φ and of the cost of moves."""
    decisions: int = 0
    """Decisions taken so far."""
    critical_batch: float | None = None
    """φ of the latest decision, in sequences, on every rank; None while it is unknown."""
    beta2_product: float | None = None
    """Π β2 over the optimizer steps that were not skipped; None before the first one, and in checkpoints of 0.1.0: then
    β2 counts as constant."""

    @property
    def here(self) -> dict[str, int]:
        """Where the run is, as every event says it."""
        return {"step": self.step, "samples_consumed": self.samples_consumed}


@dataclass(frozen=True)
class Moved:
    """What a move did, over all ranks."""

    bytes_moved: int = 0
    """Bytes that changed rank."""
    peak_bytes: int | None = None
    """Most memory that any rank used meanwhile; None where nothing moved, or the system does not tell."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase on this rank, in order."""


class Save(Protocol):
    """Weights and optimizer state on their way to disk."""

    files: list[str]
    """What `write` writes on this rank, relative to the folder."""
    is_copy: bool
    """Whether training may go on before `write`: a copy was asked for, and every rank has room for it."""

    def write(self) -> None:
        """Write this rank's share. Not collective, and fit for a thread of its own; errors are those of `finish`."""

    def finish(self) -> None:
        """Complete it, when every rank has written. Collective. Raises RankError where a rank could not."""


class Backend(Protocol):
    """A model in training. `build` comes first; every method is collective over all ranks."""

    device: torch.device

    @property
    def is_built(self) -> bool:
        """Whether there is a model."""

    @property
    def configuration(self) -> Configuration:
        """What is built."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that were not skipped."""

    def open_data(self, prepared: Path) -> tuple[Batches, Batches]:
        """Training and held-out sequences of a prepared folder. Their order depends on the job's seed alone."""

    def fingerprint(self) -> Fingerprint:
        """What measurements made here are about."""

    def build(self, configuration: Configuration) -> None:
        """Make groups, model and optimizer from nothing: initial weights, a function of the seed alone."""

    def train_step(self, batches: Batches, request: StepRequest) -> StepResult:
        """One optimizer step.

        Where a step `on_trial` finds too little memory on any rank before a weight has changed on any, RankError is
        raised on all, and `recover` has to come next.
        """

    def evaluate(self, batches: Batches, sequences: int) -> float:
        """Mean loss over the first `sequences` held-out sequences, nats a token."""

    def move(self, configuration: Configuration) -> Moved:
        """Go on in another configuration with the same weights and optimizer state. Raises RankError
        (copus.collectives) where it could not, and goes on in the old configuration."""

    def recover(self, configuration: Configuration) -> Moved:
        """Go on in another configuration after `train_step` raised RankError, from the weights before that step."""

    def begin_save(self, folder: Path, copy: bool) -> Save:
        """Prepare to write weights and optimizer state, in a format that every layout can read. With `copy` they are
        those of now, whatever the job does before they are written. Raises RankError where a rank could not."""

    def load(self, folder: Path, optimizer_steps: int) -> None:
        """Read them into what is built, without running any code that the files may ask for."""
