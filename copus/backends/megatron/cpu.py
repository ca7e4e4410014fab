"""Lets unmodified megatron-core 0.16 to 0.19 train on CPU and gloo. Does nothing if CUDA is present.

Call `before_import()` before any other import of megatron, and `adapt()` afterwards. The real `torch` stays as it is,
except for `Tensor.cuda`: Megatron's modules get a facade as their global `torch`. Line numbers are those of
megatron-core 0.16.1. Everything that is patched exists up to 0.19; if not, `versions.patch` fails.
"""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from copus.backends.megatron.versions import check_installed, patch

_CPU = torch.device("cpu")
_DEVICE_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "zeros_like", "ones_like", "empty_like")
_MODULES = (  # modules whose global `torch` becomes the facade: all must be imported before it is installed
    "distributed",
    "models.gpt",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel",
    "transformer.moe.moe_layer",
)
_adapted = False


def before_import() -> None:
    """Turn the jit fuser off, also in the modules that megatron.core.jit itself imports (jit.py:21).

    torch.compile of pointwise functions needs a C++ compiler on CPU, and importing it takes a third of the time of all
    imports.
    """
    if torch.cuda.is_available():
        return
    compile_ = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compile_
    disable_jit_fuser()


def _uncompiled(function: Any = None, **_: Any) -> Any:
    """torch.compile, as a decorator with or without options, that does nothing."""
    return function if function is not None else lambda decorated: decorated


def adapt() -> None:
    """Refuse an untested megatron-core. Then, without CUDA, install the facade, once."""
    check_installed()
    global _adapted
    if _adapted or torch.cuda.is_available():
        return
    _adapted = True
    facade = _TorchFacade()
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = facade  # type: ignore[attr-defined]
    # `.cuda()` raises on a CPU build; megatron calls it on activations, e.g. schedules.py:596, optimizer.py:473
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    # random.py:79 and :51 read and set the state of CUDA generators; here the default CPU generator stands in for them
    from megatron.core.tensor_parallel import random as megatron_random

    _patch(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _patch(megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    _adapt_experts()

    # layers.py:150 creates every whole weight on every rank; ours are filled by `model.initialize`, or by a move
    from megatron.core.tensor_parallel import layers

    _patch(layers, "_initialize_affine_weight_cpu", _mark_affine_weight)

    # optimizer.py:671-690 and distrib_optimizer.py:361-420 compare `param.type()` with 'torch.cuda.FloatTensor' and the
    # like
    from megatron.core.optimizer import distrib_optimizer, optimizer

    half = optimizer.Float16OptimizerWithFloat16Params
    _patch(half, "__init__", _with_cuda_type_names(half.__init__))
    distributed = distrib_optimizer.DistributedOptimizer
    build = _with_cuda_type_names(distributed._build_model_and_main_param_groups.__func__)
    _patch(distributed, "_build_model_and_main_param_groups", classmethod(build))


def _adapt_experts() -> None:
    """Let token dispatchers work with CPU tensors and gloo."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    # moe_utils.py:1093 makes numpy arrays of the splits of an all-to-all only if they come from a GPU
    move = token_dispatcher.maybe_move_tensor_to_cpu

    def as_numpy_too(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else move(tensor, as_numpy)

    _patch(token_dispatcher, "maybe_move_tensor_to_cpu", as_numpy_too)

    # mappings.py:152 and :194 gather and scatter unequal parts of the tokens over the ranks that an expert is cut over;
    # gloo knows equal ones only
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_unequal(tensor: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(tensor, group, None, use_global_buffer)
        padded = tensor.new_zeros((max(output_split_sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter_unequal(tensor: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(tensor, group, None, use_global_buffer)
        total = tensor.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].contiguous()

    _patch(mappings, "_gather_along_first_dim", gather_unequal)
    _patch(mappings, "_reduce_scatter_along_first_dim", scatter_unequal)


def _patch(owner: Any, name: str, replacement: Any) -> None:
    patch(owner, name, replacement, oldest=(0, 16), newest=(0, 19))


class _Stream:
    """Stands in for every stream and event. There is one, so that no code finds itself on a side stream."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


_STREAM = _Stream()


class _CudaFacade(types.ModuleType):
    """`torch.cuda` as Megatron sees it: the few functions that it calls without checking for a device."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.current_device = lambda: _CPU  # e.g. mappings.py:91, p2p_communication.py:313
        self.synchronize = lambda *args, **kwargs: None  # e.g. p2p_communication.py:588
        # token_dispatcher.py:418 and others; 0.19: param_and_grad_buffer.py:632
        self.Stream = self.Event = self.current_stream = lambda *args, **kwargs: _STREAM
        self.stream = lambda stream: contextlib.nullcontext()
        self.empty_cache = lambda: None  # parallel_state, dist_checkpointing
        self.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # random.py:235
        self.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # random.py:80
        self.manual_seed = torch.manual_seed  # random.py:237

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchFacade(types.ModuleType):
    """`torch` as Megatron's modules see it: factories create tensors for "cuda" on the CPU (e.g. schedules.py:983)."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaFacade()
        for name in _DEVICE_FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        self.__dict__[name] = value  # the next look-up is a plain one
        return value


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            device = _CPU
        kwargs.pop("pin_memory", None)  # pinning needs CUDA
        return factory(*args, device=device, **kwargs)

    return make


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    original = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return str(original(self)).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call


def _mark_affine_weight(weight: torch.Tensor, *args: Any, stride: int = 1, **kwargs: Any) -> None:
    """Replaces `_initialize_affine_weight_cpu(weight, output_size, input_size, per_partition_size, partition_dim, …)`:
    marks the weight without filling it."""
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=args[3], stride=stride)
