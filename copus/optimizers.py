"""The optimizers that a job file may name: their hyperparameters, what they keep of a weight, and how their values
follow the global batch.

To add one: a class here and in `Optimizer`, its update in `copus/backends/optimizers/`, and its kind in the
descriptions of the backends that run it. Torch-free, since the job file is read where there is no torch.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, Tag, model_validator

from profiles.optimizer_state import OptimizerState
from profiles.record import Record

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moving average."""


class Statistic(NamedTuple):
    """A tensor that an optimizer keeps of a weight, in fp32."""

    name: str
    """Its suffix in checkpoints: `model.norm.weight/exp_avg`."""
    axes: tuple[int, ...]
    """The axes of the weight that it has: all of them, or the one that is left of a mean over the others."""


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is a matrix inside the layers: no embedding, no output layer, no vector."""
    return len(shape) == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight"))


class BatchRules(Record):
    """How an optimizer's values follow the batch. They are for `training.reference_batch`; κ = B / B_ref, capped at the
    critical batch."""

    elementwise: ClassVar[bool] = True
    """Whether an element's update depends on nothing but that element's gradients, so that a rank may hold any range of
    a weight."""
    has_second_moment: ClassVar[bool] = False
    """Whether it keeps an average of squared gradients, with the decay rate β2."""
    fused: ClassVar[bool] = False
    """Whether fp32 weights are updated by one of torch's fused kernels, which makes no tensors."""
    scratch_of_matrices: ClassVar[float] = 1.0
    """fp32 tensors with the shape of a matrix inside the layers that its update makes and frees again
    (`copus/backends/optimizers/updates.py`)."""
    scratch_of_others: ClassVar[float] = 1.0
    """Likewise of an embedding or of the output layer."""

    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, a factor of the learning rate; of matrices only."""
    lr_batch_exponent: float = Field(default=0.5, ge=0, le=1)
    """a in lr · κ^a."""
    weight_decay_follows_batch: bool = True
    """Keep the decay per token: weight_decay · κ^(1−a), since the learning rate alone grows by κ^a."""
    scale_beyond_critical_batch: bool = False
    """Let κ keep growing above the critical batch φ. Without this a batch above φ counts as φ (or as the reference
    batch, if that is larger), since a larger batch hardly improves the gradient."""

    def lr_factor(self, kappa: float) -> float:
        """Factor of the learning rate over that at the reference batch."""
        return kappa**self.lr_batch_exponent

    def weight_decay_at(self, kappa: float) -> float:
        """Weight decay at κ times the reference batch: lr · weight_decay per token is the same at every batch."""
        exponent = 1 - self.lr_batch_exponent if self.weight_decay_follows_batch else 0.0
        return self.weight_decay * kappa**exponent

    @abstractmethod
    def betas_at(self, kappa: float) -> tuple[float, float]:
        """Decay rates of the averages of gradients and of their squares at κ times the reference batch; 0 for an
        average that is not kept."""

    @abstractmethod
    def statistics(self, name: str, shape: Sequence[int]) -> tuple[Statistic, ...]:
        """What is kept of the weight of that name and shape."""

    def state(self, *, masters: bool = True) -> OptimizerState:
        """What is kept of a whole model, for the memory model and the cost model. Without masters an update works in
        fp32 on one weight after the other, and none is torch's fused one."""

        def whole_tensors(name: str, axes: int) -> int:
            return sum(len(statistic.axes) == axes for statistic in self.statistics(name, (2,) * axes))

        matrix = self.statistics("layer.weight", (2, 2))
        makes_scratch = not (self.fused and masters)
        return OptimizerState(
            of_matrices=whole_tensors("layer.weight", 2),
            of_embeddings=whole_tensors("lm_head.weight", 2),
            of_vectors=whole_tensors("norm.weight", 1),
            of_rows_and_columns=any(len(statistic.axes) == 1 for statistic in matrix),
            masters=masters,
            scratch_of_matrices=makes_scratch * self.scratch_of_matrices,
            scratch_of_others=makes_scratch * self.scratch_of_others,
        )


def _whole(shape: Sequence[int], *names: str) -> tuple[Statistic, ...]:
    """Statistics of the weight's own shape."""
    return tuple(Statistic(name, tuple(range(len(shape)))) for name in names)


class AdamW(BatchRules):
    """Adam with decoupled weight decay (1711.05101). Values are for `training.reference_batch`; with κ = B / B_ref,
    capped at the critical batch, they follow the batch by the rules given at each field."""

    has_second_moment: ClassVar[bool] = True
    fused: ClassVar[bool] = True

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

    @model_validator(mode="after")
    def _check_betas(self) -> "AdamW":
        beta1, beta2 = self.betas
        if beta2 <= beta1**2:
            raise ValueError(f"betas: β2({beta2:g}) has to be larger than β1²({beta1:g}² = {beta1**2:g})")
        return self

    def betas_at(self, kappa: float) -> tuple[float, float]:
        """β1 and β2 at κ times the reference batch.

        No |update| exceeds lr · (1−β1) / √((1−β2)(1−β1²/β2)) (Cauchy-Schwarz). That is least, 1, at β2 = β1 and without
        bound at β2 = β1². So β1 is the floor, unless the job's own β2 lies below it.
        """
        beta1, beta2 = self.betas
        return beta1, max(beta2**kappa, min(beta1, beta2)) if self.beta2_follows_batch else beta2

    def statistics(self, name: str, shape: Sequence[int]) -> tuple[Statistic, ...]:
        """Both moments."""
        return _whole(shape, "exp_avg", "exp_avg_sq")


class SGD(BatchRules):
    """Stochastic gradient descent: w ← w − lr · m, m ← μ·m + (1−μ)·g. m is an average, so that the learning rate means
    the same with any momentum; without momentum nothing is kept of a weight. 2507.07101: at batch 1 momentum is not
    needed."""

    fused: ClassVar[bool] = True
    scratch_of_matrices: ClassVar[float] = 0.0
    scratch_of_others: ClassVar[float] = 0.0

    kind: Literal["sgd"]
    """The optimizer."""
    momentum: Decay = 0.0
    """μ; 0 for none."""
    momentum_follows_batch: bool = False
    """Keep the half-life of the momentum in tokens: μ^κ (2307.13813, the scaling rule of moving averages)."""
    weight_decay: NonNegativeFloat = 0.0
    """Added to the gradient, as in torch; of matrices only."""
    lr_batch_exponent: float = Field(default=1.0, ge=0, le=1)
    """a in lr · κ^a: 1 for SGD (1706.02677; 2205.10287 derives it from the stochastic differential equation)."""

    def betas_at(self, kappa: float) -> tuple[float, float]:
        """μ, and no second average."""
        return self.momentum**kappa if self.momentum_follows_batch else self.momentum, 0.0

    def statistics(self, name: str, shape: Sequence[int]) -> tuple[Statistic, ...]:
        """The average of gradients, or nothing."""
        return _whole(shape, "momentum_buffer") if self.momentum else ()


class Adafactor(BatchRules):
    """Adafactor (1804.04235) without momentum: of a matrix's squared gradients only the means of rows and of columns
    are kept. The learning rate is that of the schedule, not relative to the size of the weights."""

    elementwise: ClassVar[bool] = False
    has_second_moment: ClassVar[bool] = True

    kind: Literal["adafactor"]
    """The optimizer."""
    beta2: Decay = 0.95
    """β2 of the squares, corrected for its start as Adam's is (section 7.1 of the paper). A constant β2 and not the
    paper's 1 − t^(−0.8): that one's memory is counted in steps and has no half-life in tokens."""
    clip_threshold: PositiveFloat = 1.0
    """d: largest root mean square of the update of one tensor before it is multiplied by the learning rate."""
    lr_batch_exponent: float = Field(default=0.5, ge=0, le=1)
    """a in lr · κ^a: 0.5 as for Adam and RMSprop (2205.10287), whose update it approximates."""
    beta2_follows_batch: bool = True
    """Keep β2's half-life in tokens: β2^κ (2507.07101)."""

    def betas_at(self, kappa: float) -> tuple[float, float]:
        """No average of gradients, and β2."""
        return 0.0, self.beta2**kappa if self.beta2_follows_batch else self.beta2

    def statistics(self, name: str, shape: Sequence[int]) -> tuple[Statistic, ...]:
        """Means over rows and over columns of a matrix's squared gradients; of a vector the average of all."""
        if len(shape) == 2:
            return Statistic("row_sq", (0,)), Statistic("column_sq", (1,))
        return _whole(shape, "exp_avg_sq")


class Muon(AdamW):
    """Muon for the matrices inside the layers, AdamW for embeddings, output layer, norms and biases. The momentum of a
    matrix is made orthogonal by five Newton–Schulz steps (Jordan et al. 2024) and given the size of AdamW's updates,
    0.2 · √(larger side) (2502.16982), so that one learning rate serves both."""

    elementwise: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    scratch_of_matrices: ClassVar[float] = 2.5  # the momentum, and what is made orthogonal of it in bf16, then fp32

    kind: Literal["muon"]  # type: ignore[assignment]
    """The optimizer."""
    momentum: Decay = 0.95
    """μ of the matrices' momentum, with Nesterov's step; the same at every batch."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """β1 and β2 of AdamW for all other weights."""
    lr_batch_exponent: float = Field(default=0.5, ge=0, le=1)
    """a in lr · κ^a: 0.5. By analogy with Adam, since updates are normalised there too; no source derives it."""

    def statistics(self, name: str, shape: Sequence[int]) -> tuple[Statistic, ...]:
        """The momentum of a matrix; both of Adam's moments of the others."""
        if is_hidden_matrix(name, shape):
            return _whole(shape, "exp_avg")
        return super().statistics(name, shape)


class Signum(BatchRules):
    """Sign of the momentum (1802.04434): w ← w − lr · sign(m), m ← μ·m + (1−μ)·g."""

    kind: Literal["signum"]
    """The optimizer."""
    momentum: Decay = 0.9
    """μ; 0 is signSGD, which keeps nothing."""
    momentum_follows_batch: bool = False
    """Keep the half-life of the momentum in tokens: μ^κ (2307.13813)."""
    lr_batch_exponent: float = Field(default=0.5, ge=0, le=1)
    """a in lr · κ^a: 0.5, as for RMSprop (2205.10287): where noise dominates, sign(g) grows as g ÷ its noise does."""

    def betas_at(self, kappa: float) -> tuple[float, float]:
        """μ, and no second average."""
        return self.momentum**kappa if self.momentum_follows_batch else self.momentum, 0.0

    def statistics(self, name: str, shape: Sequence[int]) -> tuple[Statistic, ...]:
        """The average of gradients, or nothing."""
        return _whole(shape, "exp_avg") if self.momentum else ()


def _kind(value: Any) -> Any:
    """Which optimizer a section is about; `adamw` unless it says so."""
    return value.get("kind", "adamw") if isinstance(value, dict) else getattr(value, "kind", None)


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[SGD, Tag("sgd")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[Muon, Tag("muon")]
    | Annotated[Signum, Tag("signum")],
    Discriminator(
        _kind, "optimizer_kind", "input should be a section whose kind is adamw, sgd, adafactor, muon or signum"
    ),
]
"""A union told apart by `kind`."""
