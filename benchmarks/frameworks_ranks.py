"""What each rank of `benchmarks.frameworks` does: `python -m benchmarks.frameworks_ranks FOLDER` under torch's
launcher.

FOLDER/task.json says what; rank 0 leaves FOLDER/result.json.
"""

import json
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.frameworks import BATCH, MODEL, STEPS_BEFORE, make_job
from copus.backends.base import Backend
from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest, StepRules
from copus.checkpoints.sharded import read_index
from copus.devices import join_world, rank_device
from planner.noise_sources import MICROBATCH
from profiles.layout import Layout

_RULES = StepRules(lr=1e-3, betas=(0.9, 0.95))


def main(folder: Path) -> int:
    """Do the task."""
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(1)
    device = rank_device(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    join_world(device, timedelta(minutes=5))
    job = make_job(task["backend"], Layout(**task["layout"]))
    backend: Backend = find_backend(task["backend"]).load()(job, device)
    backend.build(job.training.configuration)
    bit_equal = None
    first = 0
    if "load" in task:
        first = STEPS_BEFORE * BATCH
        backend.load(Path(task["load"]), optimizer_steps=STEPS_BEFORE)
        again = Path(task["again"])
        _save(backend, again)
        bit_equal = dist.get_rank() > 0 or _equal(_read(again), _read(Path(task["load"])))
    results = []
    for step in range(task["steps"]):
        source = MICROBATCH if step == 0 and MICROBATCH in backend.description.parts(backend.configuration) else None
        results.append(backend.train_step(_batches, StepRequest(first + BATCH * step, _RULES, source)))
    if "save" in task:
        _save(backend, Path(task["save"]))
    if dist.get_rank() == 0:
        parts = results[0].parts
        shown = {
            "losses": [result.loss for result in results],
            "grad_sq": results[0].grad_sq,
            "parts": [] if parts is None else parts.squared_norms.tolist(),
            "bit_equal": bit_equal,
        }
        (folder / "result.json").write_text(json.dumps(shown))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that are a function of their index alone, with small tokens much more frequent than large ones."""
    rows = []
    for index in range(first, first + count):
        uniform = torch.rand(int(MODEL["seq_len"]) + 1, generator=torch.Generator().manual_seed(10_000 + index))
        rows.append((MODEL["vocab"] * uniform**4).long())
    tokens = torch.stack(rows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _save(backend: Backend, folder: Path) -> None:
    """Write a checkpoint into a fresh folder."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    dist.barrier()
    save = backend.begin_save(folder, copy=False)
    save.write()
    save.finish()
    dist.barrier()


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, as torch's own reader reads it."""
    state = {field.name: torch.empty(field.shape, dtype=getattr(torch, field.dtype)) for field in read_index(folder)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(str(folder)), no_dist=True)
    return state


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether names and bits are the same."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
