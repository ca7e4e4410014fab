"""What a checkpoint holds beside weights and optimizer state: where the run is, and what it has learned."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainerState:
    """Everything in a checkpoint except weights and optimizer state."""

    samples_consumed: int = 0
    step: int = 0
    data: str = ""
    """Digest of the prepared data that the run was trained on."""
    optimizer_steps: int = 0
    """Optimizer steps without the skipped ones: Adam's own count."""
    next_lr: float | None = None
    """Learning rate of the next step when this was saved; None in older checkpoints."""
    skipped_in_a_row: int = 0
    """Number of latest steps in a row whose gradients were not finite."""
    proven_samples: int = 0
    """Sequences trained on before the last step whose gradients were finite: a later checkpoint may hold useless
    weights."""
    noise: dict[str, Any] = field(default_factory=dict)
    """State of the noise estimate."""
    norms: list[float] = field(default_factory=list)
    """Norms of the steps since the last decision."""
    planner: dict[str, Any] = field(default_factory=dict)
    """State of the planner: the history of φ and the measured costs of moves."""
    speeds_of: str = ""
    """Framework and precision that the speeds in `planner` were seen with; empty in older checkpoints."""
    decisions: int = 0
    """Decisions taken so far."""
    critical_batch: float | None = None
    """φ at the latest decision, in sequences, equal on every rank; None before it is measured."""
    beta2_product: float | None = None
    """Π β2 over the optimizer steps without the skipped ones. None before the first step and in checkpoints of 0.1.0,
    whose β2 was constant."""

    @property
    def here(self) -> dict[str, int]:
        """Position of the run, as every event records it."""
        return {"step": self.step, "samples_consumed": self.samples_consumed}
