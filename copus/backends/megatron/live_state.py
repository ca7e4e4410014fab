"""The state of a running job as pieces of global tensors: weights, fp32 masters, and both Adam moments.

The geometry is megatron's own (`sharded_state_dict`); the tensors are the live ones, so nothing is copied to be
described. Works with and without the distributed optimizer, whose shards are ranges of flattened parameters.
"""

from collections.abc import Iterator
from typing import Any

import torch

from copus.backends.megatron import cpu
from copus.backends.megatron.sharded import metadata, unwrap
from copus.reshard.boxes import Box, boxes_of_range
from copus.reshard.execute import Held
from copus.reshard.plan import Piece

cpu.before_import()
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params  # noqa: E402

_MOMENTS = ("exp_avg", "exp_avg_sq")

Region = tuple[str, Box, tuple[int, ...]]
"""Part of a parameter: name of the global tensor, box in the parameter, and what to add to get to the global tensor's
offset.

The global tensor may have leading axes that the parameter lacks (the layer), of which the parameter is one slice."""


def live_state(chunks: list[Any], optimizer: Any) -> list[Held]:
    """Everything that this rank holds. The optimizer must have its state (see `upstream.prime_adam`)."""
    regions = {param: found for chunk in chunks for param, found in _regions(chunk)}
    held = [each for param, found in regions.items() for each in _whole("weight", param.data, found)]
    for wrapper in optimizer.chained_optimizers:
        if isinstance(wrapper, DistributedOptimizer):
            held += _sharded_optimizer_state(wrapper, regions)
        else:
            held += _whole_optimizer_state(wrapper, regions)
    return held


def _regions(chunk: Any) -> Iterator[tuple[torch.nn.Parameter, list[Region]]]:
    """Where each parameter of a model chunk lies in the whole model."""
    model = unwrap(chunk)
    by_storage = {param.data_ptr(): param for param in model.parameters()}
    for item in nested_values(model.sharded_state_dict(metadata=metadata())):
        if not isinstance(item, ShardedTensor | ShardedTensorFactory) or item.data is None:
            continue
        param = by_storage[item.data.data_ptr()]
        if isinstance(item, ShardedTensor):
            parts = [item]
        else:  # gate and up of a SwiGLU: one parameter, two places
            parts = list(nested_values(item.build_fn(item.key, item.data, item.replica_id, None)))
        yield param, [_region(param, part) for part in parts]


def _region(param: torch.nn.Parameter, part: ShardedTensor) -> Region:
    """`part.data` is a view of the parameter; where it begins tells where it lies in it."""
    position = (part.data.data_ptr() - param.data_ptr()) // param.element_size()
    start = []
    for stride in param.stride():
        start.append(position // stride)
        position %= stride
    box = Box(tuple(start), tuple(part.local_shape))
    lead = part.prepend_axis_num
    shift = tuple(offset - begin for offset, begin in zip(part.global_offset[lead:], start, strict=True))
    return part.key, box, (*part.global_offset[:lead], *shift)


def _piece(kind: str, region: Region, box: Box, tensor: torch.Tensor) -> Held:
    """`box` of a parameter, in global coordinates, with the tensor that holds it brought to the global number of
    axes."""
    key, _, shift = region
    lead = len(shift) - len(box.shape)
    whole = Box((*[0] * lead, *box.offset), (*[1] * lead, *box.shape)).shifted(shift)
    return Piece(f"{kind}/{key}", whole, tensor.element_size()), tensor.view(whole.shape) if lead else tensor


def _whole(kind: str, tensor: torch.Tensor, regions: list[Region]) -> Iterator[Held]:
    """Pieces of a tensor that has the parameter's shape."""
    everything = Box((0,) * tensor.dim(), tuple(tensor.shape))
    for region in regions:
        yield _piece(kind, region, region[1], tensor[region[1].slices_in(everything)])


def _range(
    kind: str, tensor: torch.Tensor, shape: tuple[int, ...], start: int, regions: list[Region]
) -> Iterator[Held]:
    """Pieces of a flat tensor that holds the elements from `start` on of a flattened parameter of `shape`."""
    position = 0
    for box in boxes_of_range(shape, start, start + tensor.numel()):
        block = tensor[position : position + box.elements].view(box.shape)
        position += box.elements
        for region in regions:
            common = box.intersect(region[1])
            if common is not None:
                yield _piece(kind, region, common, block[common.slices_in(box)])


def _whole_optimizer_state(wrapper: Any, regions: dict[torch.nn.Parameter, list[Region]]) -> Iterator[Held]:
    """State of an optimizer that holds each parameter of the rank whole."""
    masters: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    if isinstance(wrapper, Float16OptimizerWithFloat16Params):
        for halves, fulls in zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups, strict=True):
            masters.update(zip(halves, fulls, strict=True))
    owned = {param for group in wrapper.optimizer.param_groups for param in group["params"]}
    for param, found in regions.items():
        main = masters.get(param, param)
        if main not in owned:
            continue
        if main is not param:
            yield from _whole("master", main.data, found)
        for name in _MOMENTS:
            yield from _whole(name, wrapper.optimizer.state[main][name], found)


def _sharded_optimizer_state(
    wrapper: DistributedOptimizer, regions: dict[torch.nn.Parameter, list[Region]]
) -> Iterator[Held]:
    """State of the distributed optimizer: of each parameter the range that this data parallel rank owns, if any."""
    for param in wrapper.model_param_group_index_map:
        owned = wrapper._get_model_param_range_map(param)["param"]
        state = wrapper._get_main_param_and_optimizer_states(param)
        shape = tuple(param.shape)
        if param.dtype != torch.float32:  # in fp32 the main parameter is a view of the weight itself
            yield from _range("master", state["param"].data, shape, owned.start, regions[param])
        for name in _MOMENTS:
            yield from _range(name, state[name], shape, owned.start, regions[param])
