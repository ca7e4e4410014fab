"""What a rank runs on, and how it meets the others there: GPUs and NCCL, or CPU cores and gloo."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
"""NCCL's own switch (from 2.31 on): with 1, ranks may share a GPU. It tries several ranks out on one, and makes nothing
faster."""


def rank_device(local_rank: int, ranks: int) -> torch.device:
    """The device of one of the `ranks` on this machine; a GPU becomes torch's current one. Call it before anything else
    uses CUDA: it chooses how memory is allocated.

    Raises ValueError if there are fewer GPUs than ranks, and `SHARING` does not let them share.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus < ranks and os.environ.get(SHARING) != "1":
        raise ValueError(
            f"accelerators_per_node({ranks}) is more than the {gpus} GPUs that this machine shows ({SHARING}=1 lets "
            "ranks share them)"
        )
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        # Moves and changes of batch leave blocks of many sizes behind. With fixed segments they are reserved and of no
        # use to the next configuration.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device


def check_accelerator(name: str) -> None:
    """Raise ValueError if a cluster's accelerator is a GPU (any name but `cpu`), and this machine shows none."""
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"accelerator({name}): this machine shows no GPU; `cpu` is what runs on its cores")


def join_world(device: torch.device, timeout: timedelta, **place: Any) -> None:
    """Form the default process group. `place` (store, rank, world_size) goes to `init_process_group` as it is.

    NCCL gets no `device_id`. With one, torch makes every later group by an ncclCommSplit of the whole world, on ranks
    outside of the group too: thousands for one layout of a thousand ranks. Without it a group costs its own members
    a communicator, at its first collective, and the others nothing.
    """
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, **place)
    else:
        dist.init_process_group("gloo", timeout=timeout, **place)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
