"""Defects of megatron-core 0.16 to 0.19 that are gone around, on CPU and on GPU alike. Each names its upstream line and
its effect."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from copus.backends.megatron.versions import patch


def save_in_this_process() -> None:
    """Write the files of a checkpoint, one after the other, in the thread that asks for it.

    filesystem_async.py:272 forks a process for each file: from a process with the threads of process groups, of
    autograd and of a GPU, whose locks the child inherits as they happen to be. And filesystem_async.py:51 spawns a
    manager process for the results that imports `__main__` anew: some 23 s in every rank at the first save, and a hang
    where `__main__` has no guard.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def write(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
        written: dict[int, Any] = {}
        for index, bucket in enumerate(buckets):
            answers: queue.Queue[Any] = queue.Queue()
            working: queue.Queue[int] = queue.Queue()
            working.put(index)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, answers, working, use_fsync=True, use_msc=use_msc
            )
            _, answer = answers.get()
            if isinstance(answer, Exception):
                results.put(answer)
                return
            written[index] = answer
        results.put(written)

    filesystem_async._results_queue = queue.Queue()
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(write)


def use_torch_adam() -> None:
    """Build torch's (fused) AdamW also where Transformer Engine or Apex is installed.

    optimizer/__init__.py:10-35 would then take FusedAdam, which keeps its step count in the parameter group and not in
    the state: one optimizer on every machine means one way to save, to load and to move its state.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    for owner, name, value in (
        (optimizer, "Adam", torch.optim.AdamW),
        (optimizer, "USING_PYTORCH_OPTIMIZER", True),
        (distrib_optimizer, "HAVE_APEX_OR_TE", False),
    ):
        patch(owner, name, value, oldest=(0, 16), newest=(0, 19))


def patch_optimizer_loading() -> None:
    """Let the distributed optimizer load into torch's AdamW, whose state has a `step` of its own.

    distrib_optimizer.py:937-940 looks `step` up among the loaded tensors: KeyError wherever neither Transformer Engine
    nor Apex is installed.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "patched_by_copus", False):
        return

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        return original(self, model_param, tensors)

    set_states.patched_by_copus = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def prime_adam(optimizer: Any) -> None:
    """Give every parameter an (empty) Adam state, so that a checkpoint can be loaded into it.

    distrib_optimizer.py:641 asserts that every state has a `step`; a fresh torch AdamW has no state at all.
    """
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                if len(inner.state[param]) == 0:
                    for name, value in adam_state(inner, param).items():
                        if name != "step":
                            value.zero_()


def adam_state(inner: torch.optim.Optimizer, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's state in torch's Adam: `step`, `exp_avg` and `exp_avg_sq`.

    Where there is none yet it is made, with moments that are still to be filled.
    """
    state = inner.state[param]
    if len(state) == 0:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)  # where fused AdamW wants it
        state["exp_avg"] = torch.empty_like(param.data)
        state["exp_avg_sq"] = torch.empty_like(param.data)
    return state


def set_adam_step(optimizer: Any, step: int) -> None:
    """Give every parameter its own `step` tensor.

    distrib_optimizer.py:826 puts one shared tensor into every state on load; torch's AdamW then counts it once for each
    parameter, and every later bias correction is silently wrong.
    """
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                state = inner.state[param]
                if "step" in state:
                    state["step"] = torch.full((), float(step), dtype=torch.float32, device=param.device)


@contextmanager
def counted_steps(optimizer: Any) -> Iterator[None]:
    """While it is entered, an Adam that has made no step yet says that it made one.

    optimizer.py:833 and :1025 leave a step of 0 out of the state that is saved, and torch's AdamW cannot load a state
    that has none. What is loaded gets its step from `set_adam_step`.
    """
    prime_adam(optimizer)
    states = [state for inner in inner_optimizers(optimizer) for state in inner.state.values()]
    untouched = [state for state in states if not state["step"]]
    for state in untouched:
        state["step"] = torch.ones_like(state["step"])
    try:
        yield
    finally:
        for state in untouched:
            state["step"] = torch.zeros_like(state["step"])


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside megatron's chain of wrappers."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [wrapper.optimizer for wrapper in chained if wrapper.optimizer is not None]
