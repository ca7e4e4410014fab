"""What each rank of `benchmarks.checkpoint` does. By path and not as a module, and with nothing but what 0.1.0 had too:
an earlier version's code is measured by the same lines.

FOLDER/task.json says what; rank 0 leaves FOLDER/result.json.
"""

import gc
import io
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron.backend import MegatronBackend
from copus.devices import join_world, rank_device
from copus.hardware import peak_memory_bytes, reset_peak_memory
from copus.job import parse_job

try:
    from copus.backends.step_contract import StepRequest, StepRules
except ImportError:  # 0.1.0
    from copus.backends.base import StepRequest, StepRules

_RULES = StepRules(lr=1e-3, betas=(0.9, 0.95))


def main(folder: Path) -> None:
    """Train a step, save, and load."""
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(1)
    ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    device = rank_device(int(os.environ["LOCAL_RANK"]), ranks)
    join_world(device, timedelta(minutes=5))
    job = parse_job(
        {
            "name": "checkpoint",
            "model": task["model"],
            "cluster": {"accelerators_per_node": ranks},
            "training": {
                "layout": {"dp": ranks, "zero": task["zero"]},
                "global_batch": ranks,
                "tokens": 10**6,
                "staging_bytes": task["staging_bytes"],
            },
        }
    )
    backend = MegatronBackend(job, device)
    backend.build(job.training.configuration)

    def batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(first)
        tokens = torch.randint(job.model.vocab, (count, job.model.seq_len + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    backend.train_step(batches, StepRequest(0, _RULES))
    checkpoint = folder / "checkpoint"
    if dist.get_rank() == 0:
        checkpoint.mkdir()

    def save() -> None:
        saving = backend.begin_save(checkpoint, copy=False)
        saving.write()
        saving.finish()

    _import_what_is_lazy()
    result: dict[str, Any] = {"state_bytes": _state_bytes(backend)}
    for way, action in (("save", save), ("load", lambda: backend.load(checkpoint, 1))):
        gc.collect()
        dist.barrier()
        before = _memory_now()
        reset_peak_memory()
        started = time.perf_counter()
        action()
        dist.barrier()
        result[f"{way}_seconds"] = time.perf_counter() - started
        result[f"{way}_extra_bytes"] = _most((peak_memory_bytes() or 0) - before)
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # no tear-down that differs between versions


def _import_what_is_lazy() -> None:
    """Code that the first save of a process loads, and that is no part of a checkpoint's memory."""
    torch.save(torch.zeros(1), io.BytesIO())
    dist.all_gather_object([None] * dist.get_world_size(), {})


def _state_bytes(backend: Any) -> int:
    """Weights and moments of this rank, fp32."""
    weights = sum(param.numel() for chunk in backend.built.chunks for param in chunk.parameters())
    return 4 * weights + 8 * weights // (dist.get_world_size() if backend.configuration.layout.zero else 1)


def _memory_now() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def _most(amount: int) -> int:
    most = torch.tensor(amount)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
