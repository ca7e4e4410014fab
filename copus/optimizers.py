"""The optimizers that a job file may name: their hyperparameters, and how these follow the global batch.

To add one: a class here and in `Optimizer`, its kind in each backend's limits, and its construction in the backend.
Torch-free, since the job file is read where there is no torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, Tag, model_validator

from profiles.record import Record

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moving average."""


class AdamW(Record):
    """Adam with decoupled weight decay (1711.05101). Values are for `training.reference_batch`; with κ = B / B_ref,
    capped at the critical batch, they follow the batch by the rules given at each field."""

    kind: Literal["adamw"] = "adamw"
    """The optimizer."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """β1 and β2; β2 has to be larger than β1², or single updates have no bound."""
    epsilon: PositiveFloat = 1e-8
    """ε, added to √v̂."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, a factor of the learning rate."""
    lr_batch_exponent: float = Field(default=0.5, ge=0, le=1)
    """a in lr · κ^a: 0.5 for Adam (Malladi et al. 2022, 2205.10287), 1 as for SGD, 0 for none."""
    beta2_follows_batch: bool = True
    """Keep β2's half-life in tokens, β2^κ (2507.07101), but never less than β1: below that, a smaller β2 only makes the
    largest update larger."""
    weight_decay_follows_batch: bool = True
    """Keep the decay per token: weight_decay · κ^(1−a), since the learning rate alone grows by κ^a."""
    scale_beyond_critical_batch: bool = False
    """Let κ go on growing above the critical batch φ. Without this a batch above φ counts as φ (or as the reference
    batch, if that is larger): it teaches hardly more per step, so it deserves no larger steps."""

    @model_validator(mode="after")
    def _check_betas(self) -> "AdamW":
        beta1, beta2 = self.betas
        if beta2 <= beta1**2:
            raise ValueError(f"betas: β2({beta2:g}) has to be larger than β1²({beta1:g}² = {beta1**2:g})")
        return self

    def lr_factor(self, kappa: float) -> float:
        """By how much the learning rate is larger than at the reference batch."""
        return kappa**self.lr_batch_exponent

    def betas_at(self, kappa: float) -> tuple[float, float]:
        """β1 and β2 at κ times the reference batch.

        No |update| exceeds lr · (1−β1) / √((1−β2)(1−β1²/β2)) (Cauchy-Schwarz). That is least, 1, at β2 = β1 and without
        bound at β2 = β1². So β1 is the floor, unless the job's own β2 lies below it.
        """
        beta1, beta2 = self.betas
        return beta1, max(beta2**kappa, min(beta1, beta2)) if self.beta2_follows_batch else beta2

    def weight_decay_at(self, kappa: float) -> float:
        """Weight decay at κ times the reference batch: lr · weight_decay per token is the same at every batch."""
        exponent = 1 - self.lr_batch_exponent if self.weight_decay_follows_batch else 0.0
        return self.weight_decay * kappa**exponent


def _kind(value: Any) -> Any:
    """Which optimizer a section is about; `adamw` unless it says so."""
    return value.get("kind", "adamw") if isinstance(value, dict) else getattr(value, "kind", None)


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")],
    Discriminator(_kind, "optimizer_kind", "input should be a section whose kind is 'adamw'"),
]
"""A union told apart by `kind`; so far of one."""
