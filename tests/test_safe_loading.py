"""A checkpoint from a stranger: what it asks to run is not run."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from copus.backends.step_contract import StepRequest
from copus.checkpoints.safe_loading import UnsafeCheckpointError, load_metadata
from copus.checkpoints.sharded import INDEX, read_index, read_object
from tests.megatron_jobs import RULES, backend_of, random_batches, tiny_job
from tests.ranks import run_ranks


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.mark.parametrize(
    "named",
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "hub.load"),
        ("torch.serialization", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "pickle.loads"),
    ],
)
def test_nothing_but_what_torch_writes_can_be_named(named: tuple[str, str]) -> None:
    module, name = named
    asks = b"\x80\x04" + b"".join(pickle.SHORT_BINUNICODE + bytes([len(t)]) + t.encode() for t in (module, name))
    with pytest.raises(UnsafeCheckpointError, match="may not"):
        load_metadata(io.BytesIO(asks + pickle.STACK_GLOBAL + b"."))


def test_an_index_with_code_is_refused(tmp_path: Path, trace: Path) -> None:
    (tmp_path / INDEX).write_bytes(pickle.dumps(Malice(trace)))
    with pytest.raises(UnsafeCheckpointError):
        read_index(tmp_path)
    assert not trace.exists()
    with pytest.raises(AttributeError):  # the proof that the file was dangerous: it runs, and yields no metadata
        dcp.FileSystemReader(str(tmp_path)).read_metadata()
    assert trace.exists()


def test_what_torch_writes_passes() -> None:
    written = Metadata({"a": BytesStorageMetadata()}, storage_data={MetadataIndex("a", torch.Size((2,))): None})
    assert load_metadata(io.BytesIO(pickle.dumps(written))) == written


def _load_forged(folder: Path, forge: str, trace: Path) -> tuple[float, str]:
    """Save, load, then load the forged one. The loss after the honest load, and what the refusal said."""
    backend = backend_of(tiny_job(1))
    backend.train_step(random_batches, StepRequest(0, RULES))
    save = backend.begin_save(folder, copy=False)
    save.write()
    save.finish()
    backend.load(folder, 1)
    loss = backend.train_step(random_batches, StepRequest(8, RULES)).loss
    if forge == INDEX:
        (folder / INDEX).write_bytes(pickle.dumps(Malice(trace)))
    elif forge == "outside":
        index = load_metadata(io.BytesIO((folder / INDEX).read_bytes()))
        for place in index.storage_data.values():
            place.relative_path = f"../{place.relative_path}"
        (folder / INDEX).write_bytes(pickle.dumps(index))
    else:
        for path in folder.glob("*.distcp"):
            size = path.stat().st_size
            file = io.BytesIO()
            torch.save([Malice(trace), torch.zeros(1)], file)
            path.write_bytes(file.getvalue().ljust(size, b"0"))
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # not even with this
    try:
        backend.load(folder, 1)
    except Exception as error:
        return loss, f"{type(error).__name__}: {error}"
    return loss, "loaded"


def test_an_object_outside_of_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "object").write_bytes(b"something")
    for name in ("object", "../object", str(tmp_path / "object")):
        index = Metadata({}, storage_data={MetadataIndex("state"): _StorageInfo(name, 0, 9)})
        (folder / INDEX).write_bytes(pickle.dumps(index))
        if name == "object":
            file = read_object(folder, "state")
            assert file is not None
            assert file.read() == b"something"
        else:
            with pytest.raises(ValueError, match="which is not in its folder"):
                read_object(folder, "state")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("forge", "why"), [(INDEX, "mkdir"), ("tensors", ""), ("outside", "which is not in its folder")]
)
def test_a_forged_checkpoint_is_refused_and_runs_nothing(forge: str, why: str, tmp_path: Path, trace: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    loss, said = run_ranks(1, _load_forged, folder, forge, trace)[0]
    assert loss > 0
    assert said != "loaded"
    assert why in said
    assert not trace.exists()
