"""Spoiling the files of a checkpoint, and reading those of a good one."""

import random
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from copus.checkpoints.sharded import read_index
from copus.manifest import MANIFEST


def spoil(checkpoint: Path, kind: str, chance: random.Random) -> str:
    """Damage a checkpoint as a disk or a crash would. What was done."""
    if kind == "half-written checkpoint":
        (checkpoint / MANIFEST).unlink()
        return f"removed the manifest of {checkpoint.name}"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    path = chance.choice(files)
    size = path.stat().st_size
    place = chance.randrange(size)
    if kind == "truncated file":
        with open(path, "r+b") as file:
            file.truncate(place)
        return f"cut {path.name} of {checkpoint.name} at {place} of {size} bytes"
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return f"flipped a bit of byte {place} in {path.name} of {checkpoint.name}"


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint of a run, whole: weights and optimizer state."""
    return state_of(max((run / "checkpoints").glob("samples-*")))


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as torch reads it."""
    index = read_index(checkpoint)
    state = {field.name: torch.empty(field.shape, dtype=getattr(torch, field.dtype)) for field in index}
    dcp.load(state, storage_reader=dcp.FileSystemReader(str(checkpoint)), no_dist=True)
    return state


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of any element; infinite where the names or shapes differ."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel())
