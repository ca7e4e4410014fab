"""Everything about a backend that can be said without importing its framework.

No torch: a job file is checked against the description before any process starts.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Self

from copus.optimizers import AdamW, Optimizer
from planner.backend_traits import BackendTraits
from profiles.layout import Layout
from profiles.model_shape import ModelShape

if TYPE_CHECKING:
    from copus.job import DataConfig, TrainingConfig


class BackendDescription(BackendTraits, ABC):
    """A backend that a job file can name; constructed without arguments.

    The checks raise ValueError with the field, the value and the limit. `framework`, `check_model` and `load` must be
    given; what a backend shares with others it inherits from `BackendTraits`.
    """

    largest_zero: ClassVar[int] = 0
    """The highest ZeRO stage that it runs."""
    optimizers: ClassVar[tuple[str, ...]] = ("adamw",)
    """Kinds of optimizers that it has, as in `copus.optimizers`."""
    why_no_other_optimizer: ClassVar[str] = ""
    """The reason, in words."""
    trains_without_masters: ClassVar[bool] = False
    """Whether it has `training.master_weights: none`."""
    has_fp32_gradients: ClassVar[bool] = True
    """Whether gradients are fp32 also where weights have no masters."""
    has_transformer_engine: ClassVar[bool] = False
    """Whether it has `training.kernels: transformer-engine`."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    """Values of `training.precision` that it has."""
    optimizer: Optimizer = AdamW()
    """The optimizer of the job."""
    precision: str = "bf16"
    """Its precision."""
    kernels: str = "torch"
    """What its layers are computed with."""
    without_masters: bool = False
    """Whether the job has bf16 weights without fp32 masters."""
    noise_metrics: ClassVar[tuple[str, ...]] = ("plain", "adam")
    """Values of `planner.noise_metric` that it can measure."""
    compiles: ClassVar[bool] = False
    """Whether it has `training.compile`."""
    updates_in_backward: ClassVar[bool] = False
    """Whether it has `training.optimizer_in_backward`."""
    reads_documents: ClassVar[bool] = False
    """Whether it heeds what `Batches` say beside tokens: labels that do not count, positions and documents."""
    extra: ClassVar[str | None] = None
    """The extra of copus that installs `packages`."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Top-level modules that it imports and copus itself does not require."""

    least_torch: ClassVar[tuple[int, int]] = (2, 6)
    """The oldest torch that it runs on."""

    def check_installed(self) -> None:
        """Raise ValueError if a package is missing or torch is too old, with the command that installs it."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise ValueError(f"this backend needs {' and '.join(missing)}: pip install 'copus[{self.extra}]'")
        torch, least = version("torch"), self.least_torch
        if tuple(map(int, torch.split(".")[:2])) < least:
            raise ValueError(f"this backend needs torch {least[0]}.{least[1]} or newer, and torch {torch} is installed")

    @abstractmethod
    def check_model(self, model: ModelShape) -> None:
        """Raise ValueError for a model that it does not build."""

    def for_training(self, training: "TrainingConfig") -> Self:
        """This description of a job with that optimizer, with masters or without, that precision and kernels."""
        described = copy.copy(self)
        described.optimizer, described.without_masters = training.optimizer, training.without_masters
        described.precision, described.kernels = training.precision, training.kernels
        return described

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise ValueError for an optimizer that it does not have."""
        if optimizer.kind not in self.optimizers:
            why = f": {self.why_no_other_optimizer}" if self.why_no_other_optimizer else ""
            raise ValueError(f"kind({optimizer.kind}): this backend has {', '.join(self.optimizers)}{why}")

    def check_training(self, training: "TrainingConfig") -> None:
        """Raise ValueError for a setting of the training that it does not have. The default has all of them, in every
        precision that `check_precision` lets pass."""
        if training.precision not in self.precisions:
            raise ValueError(f"precision({training.precision}): this backend has {', '.join(self.precisions)}")
        if training.kernels != "torch" and not self.has_transformer_engine:
            raise ValueError(f"kernels({training.kernels}) is not supported by this backend: only megatron has it")
        self.check_precision(training.layout, training.precision)
        if training.compile and not self.compiles:
            raise ValueError("compile(true) is not supported by this backend: only fsdp compiles its layers")
        if training.optimizer_in_backward and not self.updates_in_backward:
            raise ValueError("optimizer_in_backward(true) is not supported by this backend: only fsdp has it")
        if training.without_masters and not self.trains_without_masters:
            raise ValueError("master_weights(none) is not supported by this backend: it keeps fp32 copies")
        if training.without_masters and training.precision != "bf16":
            raise ValueError(f"master_weights(none) needs precision(bf16), not {training.precision}")
        self.for_training(training).check_optimizer_in(training.layout)

    def check_accelerator(self, training: "TrainingConfig", name: str) -> None:
        """Raise ValueError for what the accelerator of that name does not have. The default asks for nothing."""

    def check_node(self, training: "TrainingConfig") -> None:
        """Raise ValueError for what this machine lacks, if it is a node of the job. The default needs nothing."""

    def check_data(self, data: "DataConfig") -> None:
        """Raise ValueError for a setting of the data that it would not heed."""
        for name in ("eod_mask_loss", "reset_attention_mask", "reset_position_ids", "messages_column"):
            value = getattr(data, name)
            if value and not self.reads_documents:
                raise ValueError(f"{name}({str(value).replace('True', 'true')}): not supported by this backend")

    def check_noise_metric(self, metric: str) -> None:
        """Raise ValueError for a `planner.noise_metric` that it cannot measure."""
        if metric not in self.noise_metrics:
            raise ValueError(f"noise_metric({metric}): this backend has {', '.join(self.noise_metrics)}")

    @property
    def software(self) -> str:
        """The framework and its version: `megatron-core 0.16.1`."""
        return f"{self.framework} {version(self.framework)}"

    @abstractmethod
    def load(self) -> type[Any]:
        """The class that trains, a subclass of `copus.backends.base.Backend`. Imports the framework, which may take
        seconds."""


def refuse_cut_matrices(optimizer: Optimizer, layout: Layout) -> None:
    """Raise ValueError for Muon if a rank does not have its matrices whole."""
    if optimizer.kind != "muon":
        return
    for name, value, most in (("tp", layout.tp, 1), ("zero", layout.zero, 0)):
        if value > most:
            raise ValueError(
                f"layout.{name}({value}) is not supported with optimizer.kind(muon): it needs whole matrices on each "
                f"rank, so at most {most}"
            )


def refuse_fields(model: ModelShape, refused: Iterable[str], by: str) -> None:
    """Raise ValueError if one of these optional fields of the model does not have its default."""
    for name in refused:
        value = getattr(model, name)
        if value != ModelShape.model_fields[name].default:
            raise ValueError(f"{name}({value}) is not supported by {by}")
