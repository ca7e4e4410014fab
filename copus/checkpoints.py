"""The checkpoints of a run: complete or absent, the newest few kept.

A checkpoint is a folder `checkpoints/samples-000000012345/` with the backend's files and `trainer.json`. It is written
under another name and renamed when everything is on disk, so that a folder with this name is always whole.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from copus.backends.base import Backend, TrainerState
from copus.durable import sync_folder, write_text
from profiles.configuration import Configuration

_FOLDER = "checkpoints"
_WRITING = ".writing"


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most samples, or None."""
    found = sorted((run / _FOLDER).glob("samples-*"))
    return found[-1] if found else None


def read_state(checkpoint: Path) -> tuple[TrainerState, Configuration]:
    """What the trainer has to know beside weights and optimizer state."""
    values = json.loads((checkpoint / "trainer.json").read_text())
    return TrainerState(**values["state"]), Configuration.model_validate(values["configuration"])


def write_checkpoint(run: Path, backend: Backend, state: TrainerState, keep: int) -> tuple[Path, int]:
    """Save everything that `--resume` needs; the folder and its size in bytes. Collective over all ranks."""
    writing = run / _FOLDER / _WRITING
    final = run / _FOLDER / f"samples-{state.samples_consumed:012d}"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    backend.save(writing)
    if rank == 0:
        values = {"state": asdict(state), "configuration": backend.configuration.model_dump(mode="json")}
        write_text(writing / "trainer.json", json.dumps(values))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(writing, final)
        sync_folder(final.parent)
        for old in sorted(final.parent.glob("samples-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final, sum(file.stat().st_size for file in final.rglob("*") if file.is_file())
