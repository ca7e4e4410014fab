"""What each rank of `benchmarks.reshard` does: `python -m benchmarks.reshard_ranks FOLDER` under torch's launcher.

FOLDER/task.json says what; rank 0 leaves FOLDER/result.json.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.reshard import make_job
from copus.backends.base import Backend
from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest, StepRules
from copus.devices import join_world, rank_device, wait_for
from copus.hardware import hardware_name, software_name
from copus.reshard.boxes import Box
from copus.reshard.execute import LiveState
from copus.reshard.table import ShardTable
from profiles.configuration import Configuration
from profiles.layout import Layout

_RULES = StepRules(lr=1e-3, betas=(0.9, 0.95))
_STEPS = 2


def main(folder: Path) -> int:
    """Do the task."""
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(1)
    device = rank_device(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    join_world(device, timedelta(minutes=5))
    job = make_job(task["quick"], task["backend"])
    backend: Backend = find_backend(task["backend"]).load()(job, device)
    result = _load(backend, task) if task["do"] == "load" else _move(backend, task, folder)
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _configuration(layout: Layout) -> Configuration:
    return Configuration(layout=layout, micro_batch=1, global_batch=8)


def _load(backend: Backend, task: dict[str, Any]) -> dict[str, Any]:
    """What a restarted job does before its first step."""
    backend.build(_configuration(Layout(**task["layout"])))
    backend.load(Path(task["checkpoint"]), optimizer_steps=_STEPS)
    dist.barrier()
    return {"ready": time.time()}


def _move(backend: Backend, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a little, then go through the layouts; every one is compared with the state before all moves."""
    tour = [Layout(**layout) for layout in task["tour"]]
    vocab, seq_len = backend._job.model.vocab, backend._job.model.seq_len

    def batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(vocab, (count, seq_len + 1), generator=torch.Generator().manual_seed(first))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    everything = tour[0].model_copy(update={"zero": 0})  # DP without ZeRO: every rank has everything
    backend.build(_configuration(everything))
    for step in range(_STEPS):
        backend.train_step(batches, StepRequest(8 * step, _RULES))
    truth = _whole_tensors(backend.shard_table(everything), backend.live_state())
    backend.move(_configuration(tour[0]))
    moves, saves = [], {}
    for index, layout in enumerate(tour):
        if index:
            wait_for(backend.device)
            dist.barrier()
            started = time.perf_counter()
            moved = backend.move(_configuration(layout))
            wait_for(backend.device)
            dist.barrier()
            seconds = time.perf_counter() - started
            moves.append(
                {
                    "seconds": seconds,
                    "bytes_moved": moved.bytes_moved,
                    "peak_bytes": moved.peak_bytes,
                    "phases": moved.phases,
                    "max_abs_diff": _difference(backend, truth),
                }
            )
        if layout.label not in saves:
            saves[layout.label] = _save(backend, folder / layout.label)
    device, software = hardware_name(backend._job.cluster), software_name()
    return {"moves": moves, "saves": saves, "device": device, "software": software}


def _whole_tensors(table: ShardTable, state: LiveState) -> dict[str, torch.Tensor]:
    """Copies of all tensors, put together from the shards of this rank, which must have all of them."""
    shapes = {field.name: field.shape for field in table.fields}
    whole: dict[str, torch.Tensor] = {}
    filled = dict.fromkeys(shapes, 0)
    for (name, start), tensor in state.items():
        part = tensor()
        together = whole.setdefault(name, part.new_empty(shapes[name]))
        together[Box(start, tuple(part.shape)).slices_in(Box.whole(shapes[name]))] = part
        filled[name] += part.numel()
    assert all(filled[name] == tensor.numel() for name, tensor in whole.items()), "this rank has everything"
    return whole


def _difference(backend: Backend, truth: dict[str, torch.Tensor]) -> float:
    """Largest difference of any element on any rank, weights and moments; infinite for one that is not a number."""
    worst = torch.zeros((), dtype=torch.float64, device=backend.device)
    for (name, start), tensor in backend.live_state().items():
        part = tensor()
        expected = truth[name][Box(start, tuple(part.shape)).slices_in(Box.whole(tuple(truth[name].shape)))]
        if not torch.equal(part, expected):
            worst = torch.maximum(worst, (part - expected).abs().max().double().nan_to_num(nan=torch.inf))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def _save(backend: Backend, folder: Path) -> float:
    """Seconds of a checkpoint."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    started = time.perf_counter()
    save = backend.begin_save(folder, copy=False)
    save.write()
    save.finish()
    dist.barrier()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
