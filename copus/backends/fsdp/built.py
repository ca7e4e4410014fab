"""A built model on one rank: what it consists of, and how to let go of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from copus.backends.fsdp.mesh import SHARD, TENSOR
from copus.backends.fsdp.shards import own_box, tensor_parallel_axis
from copus.backends.regions import HeldWeight, Region
from copus.reshard.boxes import Box
from copus.reshard.table import Field
from profiles.layout import Layout


class ShardedParameter(NamedTuple):
    """A parameter, and the part of it that this rank holds and updates."""

    name: str
    whole_shape: tuple[int, ...]
    parameter: torch.nn.Parameter
    """The sharded one: a DTensor. The gradient arrives here."""
    main: torch.nn.Parameter
    """The optimizer's: the local tensor of the same memory, fp32."""
    box: Box
    """Where that lies in the whole."""
    is_counted: bool
    """Whether a sum over all ranks takes this rank's part: only one of several ranks that hold the same."""
    held: HeldWeight
    """The same for the optimizer."""

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, and not to norms."""
        return len(self.whole_shape) > 1

    @property
    def gradient(self) -> torch.Tensor:
        """The step's mean gradient of the part, reduced over all replicas: fp32."""
        gradient = self.parameter.grad
        assert isinstance(gradient, DTensor), "FSDP reduces the gradient of every parameter"
        local: torch.Tensor = gradient.to_local()
        return local


@dataclass
class BuiltModel:
    """What a layout consists of on this rank."""

    device: torch.device
    layout: Layout
    rank: int
    model: Any
    """transformers' model under FSDP."""
    parameters: list[ShardedParameter] = field(default_factory=list)
    """Parameters of which this rank holds a part."""
    empty: list[ShardedParameter] = field(default_factory=list)
    """Parameters of which it holds nothing. It takes part in updates that need whole tensors, which are collective."""
    optimizer: torch.optim.Optimizer | None = None
    """The job's optimizer over the local tensors."""
    part_norms: Any = None
    """What the noise is measured with: a `PartNorms`."""
    backward_updates: Any = None
    """What updates weights in the backward pass, a `BackwardUpdates`; None if that comes after it."""

    @property
    def tp_rank(self) -> int:
        """Among the ranks that share matrices."""
        return self.rank % self.layout.tp

    @property
    def dp_rank(self) -> int:
        """Which share of the batch is this rank's."""
        return self.rank // self.layout.tp

    @property
    def fsdp_modules(self) -> list[FSDPModule]:
        """The modules whose weights are gathered and reduced together: every layer, and what is outside of them."""
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def set_options(self, options: dict[str, Any]) -> None:
        """Give the optimizer the values of a step."""
        assert self.optimizer is not None, "it is built"
        for group in self.optimizer.param_groups:
            group.update(options)
            group["weight_decay"] *= group["decays"]

    def release(self) -> None:
        """Let go of the memory, also where hooks and autograd's graph keep tensors alive in a circle."""
        for hooked in (self.part_norms, self.backward_updates):
            if hooked is not None:
                hooked.close()
        if self.optimizer is not None:
            self.optimizer.state.clear()
            self.optimizer.param_groups.clear()
        for sharded in (*self.parameters, *self.empty):
            sharded.parameter.grad = sharded.main.grad = None
        self.parameters.clear()
        self.empty.clear()
        for unsharded in fsdp_parameters(self.model):
            unsharded.free_unsharded_param()
        self.model = None


def fsdp_parameters(model: Any) -> Iterator[Any]:
    """FSDP's own record of every parameter, which torch does not make public: torch 2.13, `_fsdp_param.FSDPParam`."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params


def sharded_parameters(
    model: Any, shapes: list[tuple[str, tuple[int, ...]]], layout: Layout, rank: int, mesh: DeviceMesh
) -> list[ShardedParameter]:
    """What this rank holds of every parameter, nothing included.

    Raises RuntimeError if FSDP has cut a parameter in another way than `shards` says.
    """
    replicate_rank = rank // (layout.tp * layout.dp_shard)
    shard_groups = (mesh[SHARD].get_group(),) if layout.dp_shard > 1 else ()
    tensor_groups = (mesh[TENSOR].get_group(),) if layout.tp > 1 else ()
    parameters = dict(model.named_parameters())
    sharded = []
    for name, shape in shapes:
        parameter, box = parameters[name], own_box(name, shape, layout, rank)
        local = parameter.data.to_local()
        if box.elements and tuple(local.shape) != box.shape:
            raise RuntimeError(f"FSDP holds {tuple(local.shape)} of {name} on rank {rank}, not {box.shape}")
        axis = tensor_parallel_axis(name) if layout.tp > 1 else None
        held = HeldWeight(
            box.shape,
            (Region(Box.whole(box.shape), Field(name, str(local.dtype).removeprefix("torch."), shape), box.offset),),
            row_groups=(*shard_groups, *(tensor_groups if axis == 0 else ())),
            column_groups=tensor_groups if axis == 1 else (),
        )
        is_duplicate = tensor_parallel_axis(name) is None and rank % layout.tp > 0
        counted = replicate_rank == 0 and not is_duplicate
        sharded.append(ShardedParameter(name, shape, parameter, torch.nn.Parameter(local), box, counted, held))
    return sharded
