"""A user's own engine of DeepSpeed, as `copus.NoiseMeter` sees it. Nothing of the engine is changed but that its `step`
is watched."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from copus.backends.deepspeed.part_norms import DeepSpeedPartNorms
from copus.backends.squared_norms import norms, sum_of_squares
from copus.meter.measured import MeasuredModel
from profiles.layout import Layout


class _EnginePartNorms(DeepSpeedPartNorms):
    """Parameters in whatever groups the user's optimizer has."""

    _built: "DeepSpeedModel"  # type: ignore[assignment]

    def grad_sq_share(self, names: set[str] | None = None) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient, of all parameters or of some. Of some it is
        collective: their gradients are gathered one by one."""
        if names is None:
            return super().grad_sq_share()
        chosen = [param for name, param in self._built.model.named_parameters() if name in names]
        gradients = [safe_get_full_grad(param) for param in chosen]
        counted = gradients if dist.get_rank() == 0 else []
        return sum_of_squares(norms([gradient for gradient in counted if gradient is not None]), self._built.device)


class DeepSpeedModel(MeasuredModel):
    """An engine with data parallelism alone. It has what `DeepSpeedPartNorms` asks of a
    `copus.backends.deepspeed.built.BuiltModel`."""

    name = "DeepSpeed"

    def __init__(self, engine: Any) -> None:
        super().__init__()
        if engine.fp16_enabled():
            raise ValueError("model: DeepSpeed scales the loss of fp16, and changes the scale; use bf16 or fp32")
        if engine.mp_world_size > 1 or engine.dp_world_size != dist.get_world_size():
            raise ValueError(
                f"model: {engine.dp_world_size} of {dist.get_world_size()} ranks are data parallel; DeepSpeed can be "
                "measured if all are"
            )
        self.engine = engine
        self.model = self.called = engine.module
        self.device = torch.device(engine.device)
        self.group = dist.group.WORLD
        self.layout = Layout(dp=engine.dp_world_size, zero=engine.zero_optimization_stage())
        wrapper = self.zero_optimizer
        records = [name for name in ("bf16_groups", "bit16_groups", "fp16_groups") if hasattr(wrapper, name)]
        trained = [param for param in self.model.parameters() if param.requires_grad]
        lists = getattr(wrapper, records[0]) if records else [trained]
        names = {param: name for name, param in self.model.named_parameters()}
        self.groups = [{names[param]: param for param in group} for group in lists]
        """Parameters by name, in the groups and in the order of DeepSpeed's own records."""
        self.part_norms = _EnginePartNorms(self)  # type: ignore[arg-type]
        self.part_norms._traits = self.traits
        self.traits.reduces_every_pass = self.layout.zero >= 2
        self.traits.has_norm_layers = self.part_norms.has_norm_layers
        self._step: Callable[..., Any] | None = None

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's wrapper around the optimizer, or with ZeRO 0 the optimizer itself."""
        return self.engine.optimizer

    def watch(self, after_pass: Callable[[], None], at_step: Callable[[], None]) -> None:
        """Before every update of the engine, which clips in it."""
        self.part_norms.count_passes(lambda: None)
        self._step = step = self.engine.step

        def watched(*arguments: Any, **options: Any) -> Any:
            if self.engine.is_gradient_accumulation_boundary():
                at_step()
            return step(*arguments, **options)

        self.engine.step = watched

    def close(self) -> None:
        """Remove all hooks."""
        super().close()
        if self._step is not None:
            del self.engine.step  # the method is there again
