"""A world of many ranks with one process in it: collectives return at once, with numbers of the right kind.

torch has a backend like it for its own tests (`fake`), which leaves what is received as it was: whatever lies in that
memory. A gradient that is not finite by chance would skip the optimizer, and its time be missing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

_c10d: Any = torch._C._distributed_c10d
_ProcessGroup: Any = dist.ProcessGroup  # its stubs name every argument, and not as all versions of torch do
SOLO = "solo"
"""Name of the backend."""


class _SoloGroup(_ProcessGroup):
    """The group as one of its members sees it, if all the others had what it has and sent zeros."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._name = ""

    def _set_group_name(self, name: str) -> None:  # torch's own keeps it in C++, where a group of Python has no room
        self._name = name

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        return SOLO

    @property
    def group_name(self) -> str:
        return self._name

    def allreduce(self, tensors: list[torch.Tensor], options: Any = None) -> Any:
        return _done(tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], options: Any = None) -> Any:
        return _done(tensors)

    def reduce(self, tensors: list[torch.Tensor], options: Any = None) -> Any:
        return _done(tensors)

    def broadcast(self, tensors: list[torch.Tensor], options: Any = None) -> Any:
        return _done(tensors)

    def barrier(self, opts: Any = None) -> Any:  # torch names it
        return _done(None)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], options: Any = None) -> Any:
        for many, one in zip(outputs, inputs, strict=True):
            for output in many:
                output.detach().copy_(one)
        return _done(outputs)

    def _allgather_base(self, output: torch.Tensor, input_: torch.Tensor, options: Any = None) -> Any:
        output.detach().view(self.size(), -1).copy_(input_.reshape(1, -1).expand(self.size(), -1))
        return _done(output)

    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], options: Any = None) -> Any:
        for one, many in zip(outputs, inputs, strict=True):
            one.detach().copy_(many[self.rank()])
        return _done(outputs)

    def _reduce_scatter_base(self, output: torch.Tensor, input_: torch.Tensor, options: Any = None) -> Any:
        output.detach().view(-1).copy_(input_.reshape(self.size(), -1)[self.rank()])
        return _done(output)

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
        for output, input_ in zip(outputs, inputs, strict=True):
            self._allgather_base(output, input_)
        return _done(outputs)

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
        for output, input_ in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, input_)
        return _done(outputs)

    def alltoall_base(
        self, output: torch.Tensor, input_: torch.Tensor, output_splits: Any, input_splits: Any, options: Any = None
    ) -> Any:
        output.detach().zero_()
        return _done(output)

    # Newer versions of torch call the same things so:
    all_gather_single, all_gather_single_coalesced = _allgather_base, allgather_into_tensor_coalesced
    reduce_scatter_single, reduce_scatter_single_coalesced = _reduce_scatter_base, reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> Any:
        return _done(tensors)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> Any:
        for tensor in tensors:
            tensor.detach().zero_()
        return _done(tensors)


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return _c10d._create_work_from_future(future)


def register() -> None:
    """Make the backend known to torch."""
    if not hasattr(dist.Backend, SOLO.upper()):
        dist.Backend.register_backend(
            SOLO, lambda store, rank, size, timeout: _SoloGroup(rank, size), devices=["cpu", "cuda"]
        )


@contextmanager
def world_of_one(size: int, rank: int) -> Iterator[None]:
    """In here this process is a rank of that many, the others of which nobody runs. There must be no other world."""
    register()
    dist.init_process_group(SOLO, store=dist.HashStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
