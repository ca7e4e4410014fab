"""Runs a function on several ranks and returns what each returned: on gloo, or (`pytest --nccl`) on NCCL and GPUs.

Importing torch and megatron takes 5 s; a fork server imports them once for the whole test session, and every rank is a
fork of it.
"""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

NCCL = "COPUS_TEST_NCCL"
"""In the environment where ranks are to use GPUs."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *(
            "copus.worker",
            "copus.backends.megatron.backend",
            "copus.backends.fsdp.backend",
            "copus.tracking.tensorboard",
            "launch.engines.local",
        ),
        "torch._dynamo",  # which torch's optimizers import at their first step
    ]
)


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_seconds: float = 240,
    context: multiprocessing.context.ForkServerContext | multiprocessing.context.SpawnContext = _context,
) -> list[Any]:
    """Call `function(*arguments)` on every rank of a fresh world; the results by rank. Raises where any rank raised.
    Another `context` than the fork server's is for ranks that import other things."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before the fork server starts; ranks inherit it
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for GPUs in any other way spoils them for forks
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, world_size, folder, sender, function, arguments))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _gather(pipes, timeout_seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def own_device() -> Any:
    """The torch.device of this rank."""
    import torch

    from copus.devices import rank_device

    if NCCL not in os.environ:
        return torch.device("cpu")
    return rank_device(int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))


def _gather(pipes: list[Connection], timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout=timeout_seconds)
        if not ready:
            raise TimeoutError(
                f"ranks {sorted(set(range(len(pipes))) - set(results))} did not answer in {timeout_seconds} s"
            )
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died") from None
            if not ok:
                raise RuntimeError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, world_size: int, folder: str, pipe: Connection, function: Callable[..., Any], arguments: tuple
) -> None:
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
        import torch
        import torch.distributed as dist

        from copus.devices import SHARING, join_world

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # upstream's, hundreds of lines of them
        store = dist.FileStore(f"{folder}/store", world_size)
        os.environ[SHARING] = "1"
        join_world(own_device(), timedelta(seconds=120), store=store, rank=rank, world_size=world_size)
        result = function(*arguments)
        dist.barrier()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        for child in multiprocessing.active_children():  # a server of Megatron's own checkpoints waits for ever
            child.kill()
        os._exit(0)  # no tear-down of groups that a failed peer may have left behind
