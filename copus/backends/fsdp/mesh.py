"""Process groups and device meshes of a layout. Ranks count tensor parallel, then shard, then replicate."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from copus.collectives import no_agreement
from profiles.layout import Layout

REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"
"""Dimensions of the mesh: copies of the state, ranks that share one copy, ranks that share matrices."""


class Meshes:
    """Makes the mesh of a layout from process groups that are kept for when a later layout has use of them.

    A group belongs to its ranks, not to a dimension: layouts that need the same ranks together share it. That is safe,
    since every rank issues its collectives in the same order.
    """

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        self._device = device
        self._timeout = timedelta(seconds=timeout_seconds)
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        """Of this rank, by the distance of two neighbours in it and its size; what was used last is the last. All
        ranks have the same keys."""
        self._most = 6 if device.type == "cuda" else 24
        """Groups cost threads and sockets on a CPU, where many are cheap, and device memory with NCCL."""

    def mesh(self, layout: Layout) -> DeviceMesh:
        """The mesh of a layout, `REPLICATE` × `SHARD` × `TENSOR`. Collective over all ranks."""
        sizes = (layout.dp // layout.dp_shard, layout.dp_shard, layout.tp)
        strides = (layout.dp_shard * layout.tp, layout.tp, 1)
        own = [self._group(stride, size) for stride, size in zip(strides, sizes, strict=True)]
        while len(self._groups) > self._most:
            dist.destroy_process_group(self._groups.pop(next(iter(self._groups))))
        ranks = torch.arange(layout.accelerators).view(sizes)
        return DeviceMesh.from_group(own, self._device.type, mesh=ranks, mesh_dim_names=(REPLICATE, SHARD, TENSOR))

    def _group(self, stride: int, size: int) -> dist.ProcessGroup:
        """The group of this rank with `size` ranks that lie `stride` apart. Collective over all ranks. Raises
        MidCollectiveError if this rank cannot make it, since the others may wait for it."""
        key = (1 if size == 1 else stride, size)
        group = self._groups.pop(key, None)
        if group is None:
            with no_agreement():
                group = self._make_alone() if size == 1 else self._make_all(stride, size)
        self._groups[key] = group
        return group

    def _make_alone(self) -> dist.ProcessGroup:
        return dist.new_group([dist.get_rank()], timeout=self._timeout, use_local_synchronization=True)

    def _make_all(self, stride: int, size: int) -> dist.ProcessGroup:
        """Every rank takes part in making every group, and torch numbers them. With `use_local_synchronization` it
        would name a group by its ranks and by how many groups there are: one that is made anew would meet in the store
        what a destroyed one of the same name has left there, and wait for ranks where they no longer are."""
        rank, span = dist.get_rank(), stride * size
        own = None
        for first in range(0, dist.get_world_size(), span):
            for offset in range(first, first + stride):
                ranks = list(range(offset, offset + span, stride))
                group = dist.new_group(ranks, timeout=self._timeout)
                own = group if rank in ranks else own
        assert own is not None, "the groups cover all ranks"
        return own

    def destroy(self) -> None:
        """Destroy all groups. Collective."""
        for group in self._groups.values():
            dist.destroy_process_group(group)
        self._groups.clear()

    def forget(self) -> None:
        """Drop all groups, broken as they are. Not collective."""
        self._groups.clear()
