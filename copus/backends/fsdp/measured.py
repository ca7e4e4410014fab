"""A user's own FSDP2 model (`fully_shard`), as `copus.NoiseMeter` sees it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from copus.backends.fsdp.built import fsdp_parameters
from copus.backends.fsdp.part_norms import FsdpPartNorms
from copus.meter.measured import GradientProbe, MeasuredModel
from profiles.layout import Layout


class _Shard(NamedTuple):
    """What `FsdpPartNorms` asks of a parameter: the interface of `copus.backends.fsdp.built.ShardedParameter`."""

    name: str
    parameter: torch.nn.Parameter
    is_counted: bool

    @property
    def gradient(self) -> torch.Tensor:
        """The step's mean gradient of this rank's shard; empty if there is none."""
        gradient = self.parameter.grad
        if gradient is None:
            return torch.empty(0)
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient


class FsdpModel(MeasuredModel):
    """A model under `fully_shard`, over all ranks; HSDP too."""

    name = "FSDP2"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = self.called = model
        records = list(fsdp_parameters(model))
        meshes = {record.mesh_info.mesh for record in records}
        if len(meshes) != 1 or next(iter(meshes)).size() != dist.get_world_size():
            raise ValueError(
                f"model: its {len(meshes)} FSDP meshes span {[mesh.size() for mesh in meshes]} of "
                f"{dist.get_world_size()} ranks; one mesh over all of them can be measured"
            )
        named = dict(model.named_parameters())
        wrapped = {record.sharded_param for record in records}
        whole = [name for name, param in named.items() if param not in wrapped]
        if whole:
            raise ValueError(f"model: {whole[0]} is outside of FSDP, and not reduced: call fully_shard on the root")
        mesh = meshes.pop()
        self.dp_rank, self.tp_rank = dist.get_rank(), 0
        self.device = (
            torch.device(mesh.device_type, torch.cuda.current_device())
            if mesh.device_type == "cuda"
            else (torch.device(mesh.device_type))
        )
        self.group = dist.group.WORLD
        self.layout = Layout(dp=mesh.size(), zero=3)
        first_copy = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
        self.parameters = [_Shard(name, param, first_copy) for name, param in named.items() if param.requires_grad]
        self.part_norms = FsdpPartNorms(self)  # type: ignore[arg-type]
        self.part_norms._traits = self.traits
        self.traits.reduces_every_pass = True
        self.traits.has_norm_layers = self.part_norms.has_norm_layers
        self.gradient_probe = GradientProbe(named)
        self._watching = model.register_forward_hook(self._after_forward)

    def _after_forward(self, *_: Any) -> None:
        """The gathered parameters exist since the first forward pass."""
        assert self.gradient_probe is not None
        self.part_norms.watch()
        for record in fsdp_parameters(self.model):
            if record._param_fqn == self.gradient_probe.name:
                self.gradient_probe.watch(record.unsharded_param)
        self._watching.remove()

    def watch(self, after_pass: Callable[[], None], at_step: Callable[[], None]) -> None:
        """After every backward pass."""
        self.part_norms.count_passes(after_pass)

    def close(self) -> None:
        """Remove all hooks."""
        super().close()
        self._watching.remove()
