"""Somebody's own model, as the meter sees it: which ranks share a step, whose gradients are whole, and when they are
ready."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from copus.backends.registry import MEASURED
from copus.backends.whole_part_norms import WholePartNorms
from planner.backend_traits import BackendTraits, PartCount
from planner.noise_sources import MICROBATCH, NORMLAYER, REPLICA
from profiles.configuration import Configuration
from profiles.layout import Layout

PROBED = 64
"""Elements of one parameter's gradient that are followed from the backward pass to the reduced gradient."""


class MeasuredTraits(BackendTraits):
    """The parts that a step has in a loop that cannot be asked to run a micro-batch as two halves."""

    has_norm_layers = True
    """Whether the model has norms that can be measured."""
    shows_microbatches = True
    """Whether the gradient of a micro-batch is ever to be seen alone."""
    reduces_every_pass = False
    """Whether a replica with several micro-batches never has a gradient of its own."""

    def parts(self, configuration: Configuration) -> dict[str, PartCount]:
        """The parts of a step that can be compared, by noise source."""
        parts = super().parts(configuration)
        if not self.has_norm_layers:
            del parts[NORMLAYER]
        if self.reduces_every_pass and configuration.num_microbatches > 1:
            del parts[REPLICA]
        if not self.shows_microbatches or parts[MICROBATCH].number < 2:
            del parts[MICROBATCH]
        return parts


class MeasuredModel(ABC):
    """What the meter asks of a framework. `part_norms` is closed with it."""

    name: str
    """The framework, for people."""
    part_norms: Any
    """What sees the gradients: a `PartNorms` of a backend."""
    layout: Layout
    """Degrees of parallelism; of `zero` only whether gradients are shared out is of interest."""
    device: torch.device
    """Where figures are added up."""
    group: dist.ProcessGroup | None
    """The ranks that a step is shared among; None if there is one rank."""
    called: torch.nn.Module | None
    """The module whose first argument tells the sequences of a micro-batch; None if they have to be said."""
    returns_loss: torch.nn.Module | None = None
    """The module that returns logits or losses, if that is not `called`; on one rank, which warns of them."""

    def __init__(self) -> None:
        self.traits = MeasuredTraits()
        self.gradient_probe: GradientProbe | None = None
        """What checks that nobody changes gradients; None if the framework leaves nothing to check."""

    @abstractmethod
    def watch(self, after_pass: Callable[[], None], at_step: Callable[[], None]) -> None:
        """Call `after_pass` after every backward pass, with reduced gradients, or `at_step` before every update of the
        weights and before anything is clipped, or both."""

    @property
    def passes(self) -> int:
        """Backward passes of this step so far."""
        passes: int = self.part_norms.passes
        return passes

    @property
    def leads(self) -> bool:
        """Whether this rank reports."""
        return self.group is None or dist.get_rank(self.group) == 0

    def start(self, source: str | None, configuration: Configuration) -> None:
        """Begin a step."""
        self.part_norms.start(source, configuration)
        if self.gradient_probe is not None:
            self.gradient_probe.start(source is not None)

    def grad_sq_share(self) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient, before clipping: 0-d, float64."""
        share: torch.Tensor = self.part_norms.grad_sq_share()
        return share

    def probe(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What this replica's backward passes gave to some elements, and this rank's share of what became of them:
        float64 each, of the same length on all ranks. None if the framework leaves nothing to check."""
        return None if self.gradient_probe is None else self.gradient_probe.figures(self.leads)

    def close(self) -> None:
        """Remove all hooks."""
        self.part_norms.close()
        if self.gradient_probe is not None:
            self.gradient_probe.close()


class WholeModel(MeasuredModel):
    """A model that every replica holds whole: plain torch, or DistributedDataParallel."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._wrapper = model if isinstance(model, DistributedDataParallel) else None
        module = self.called = model.module if isinstance(model, DistributedDataParallel) else model
        self.name = "plain torch" if self._wrapper is None else "DistributedDataParallel"
        self.group = None if self._wrapper is None else self._wrapper.process_group
        dp = 1 if self.group is None else self.group.size()
        self.layout = Layout(dp=dp)
        self.device = next(module.parameters()).device
        replica = 0 if self.group is None else dist.get_rank(self.group)
        self.part_norms = WholePartNorms(module, self.traits, replica, self.device)
        self.traits.has_norm_layers = self.part_norms.has_norm_layers
        self.gradient_probe = GradientProbe(dict(module.named_parameters()))
        self.gradient_probe.watch(self.gradient_probe.param)

    def watch(self, after_pass: Callable[[], None], at_step: Callable[[], None]) -> None:
        """After every backward pass."""

        def reduced() -> None:
            if self._wrapper is not None and self.passes == 1:  # without `no_sync`
                self.traits.reduces_every_pass = bool(self._wrapper.require_backward_grad_sync)
            after_pass()

        self.part_norms.count_passes(reduced)


class GradientProbe:
    """Follows some elements of the smallest parameter: the sum of what the backward passes gave them, and their
    gradient in the end. If the two differ, somebody has changed gradients that the meter takes for the loss's."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        trained = [(param.numel(), name) for name, param in parameters.items() if param.requires_grad]
        if not trained:
            raise ValueError("model: no parameter requires a gradient")
        self.name = min(trained)[1]
        """Name of the parameter."""
        self.param = parameters[self.name]
        self._on = False
        self._sum: torch.Tensor | None = None
        self._hook: Any = None

    def start(self, on: bool) -> None:
        """Begin a step."""
        self._on, self._sum = on, None

    def watch(self, param: torch.Tensor) -> None:
        """See gradients at this tensor, which is the parameter or stands for it."""
        self._hook = param.register_hook(self._see)

    @torch.no_grad()
    def _see(self, gradient: torch.Tensor) -> None:
        if self._on:
            elements = gradient.detach().reshape(-1)[:PROBED].double()
            self._sum = elements if self._sum is None else self._sum + elements

    def gradient(self) -> torch.Tensor | None:
        """The elements of the gradient as it is now, on all ranks."""
        gradient = self.param.grad
        if gradient is None:
            return None
        whole: torch.Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        return whole.detach().reshape(-1)[:PROBED].double()

    @torch.no_grad()
    def figures(self, leads: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """What `MeasuredModel.probe` gives."""
        nothing = torch.zeros(min(PROBED, self.param.numel()), dtype=torch.float64, device=self.param.device)
        gradient = self.gradient()
        return (
            nothing if self._sum is None else self._sum,
            gradient if leads and gradient is not None else nothing,
        )

    def close(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()


def measured_model(model: Any, optimizer: Any) -> MeasuredModel:
    """The model as the meter sees it, by the framework that it belongs to.

    `model` is a module, plain or wrapped, an engine of DeepSpeed, or the model chunks of megatron-core. Raises
    TypeError for what cannot be measured, ValueError for settings under which it cannot.
    """
    first = model[0] if isinstance(model, Sequence) and model else model
    framework = _framework(first)
    if framework == "megatron":
        chunks = list(model) if isinstance(model, Sequence) else [model]
        return _load(framework)(chunks, optimizer)
    if framework == "deepspeed":
        return _load(framework)(model)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch module, an engine or megatron-core's model chunks, got {type(model)}")
    if type(model).__name__ == "FullyShardedDataParallel":
        raise TypeError("model: FSDP1 keeps no gradients of parameters to measure; use fully_shard (FSDP2)")
    if framework == "fsdp":
        return _load(framework)(model)
    if any(hasattr(param, "full_tensor") for param in model.parameters()):
        raise TypeError("model: parameters are split over ranks (DTensor), but by no FSDP2 that would reduce them")
    return WholeModel(model)


def _framework(model: Any) -> str:
    """`megatron`, `deepspeed`, `fsdp` or nothing, told without importing any of them."""
    names = {name.__module__.partition(".")[0] for name in type(model).__mro__}
    for framework in ("megatron", "deepspeed"):
        if framework in names:
            return framework
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return "fsdp" if any(hasattr(module, "_get_fsdp_state") for module in modules) else ""


def _load(framework: str) -> Callable[..., MeasuredModel]:
    """A framework's own, imported when it is wanted."""
    module, _, name = MEASURED[framework].partition(":")
    measured: Callable[..., MeasuredModel] = getattr(importlib.import_module(module), name)
    return measured
