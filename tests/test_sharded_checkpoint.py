"""Weights and optimizer state on disk: written by owners, read by any layout, and in little memory."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from copus.backends.megatron import model as megatron_model
from copus.backends.step_contract import StepRequest
from copus.checkpoints.sharded import Save, _windows, find_sources, load, read_index
from copus.hardware import peak_memory_bytes, reset_peak_memory
from copus.reshard.boxes import Box
from copus.reshard.plan import owned_parts
from copus.reshard.table import Field, ShardTable
from tests.megatron_jobs import RULES, backend_of, random_batches, save_checkpoint, tiny_job
from tests.ranks import own_device, run_ranks
from tests.test_any_model import build_another_model

FORMER = Path(__file__).parent / "former_checkpoints.tar.xz"
"""Checkpoints of earlier versions, each with its job and the losses of the four steps that followed: three of 0.1.0 in
different layouts, and one of a later version that still had Megatron's names (`megatron-names`)."""


def _save_and_load(
    folder: Path, before: dict[str, Any], after: list[dict[str, Any]], another: bool, settings: dict[str, Any]
) -> None:
    """What is read on any layout is what was written, to the bit, and training goes on with it."""
    if another:
        build_another_model()
    job = tiny_job(dist.get_world_size(), before, {"tied_embeddings": not another}, micro_batch=2, **settings)
    backend = backend_of(job)
    for step in range(2):
        backend.train_step(random_batches, StepRequest(8 * step, RULES))
    save_checkpoint(backend, folder)
    losses = [backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss for step in range(2, 4)]
    state = {field.name: torch.empty(field.shape, dtype=getattr(torch, field.dtype)) for field in read_index(folder)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(str(folder)), no_dist=True)  # torch's own reader
    for layout in after:
        configuration = job.training.configuration
        target = configuration.layout.model_validate({**configuration.layout.model_dump(), **_SINGLE, **layout})
        backend.build(configuration.model_copy(update={"layout": target}))
        backend.load(folder, optimizer_steps=2)
        for (name, start), tensor in backend.live_state().items():
            part, whole = tensor(), state[name]
            expected = whole[Box(start, tuple(part.shape)).slices_in(Box.whole(tuple(whole.shape)))]
            assert torch.equal(part.cpu(), expected), (layout, name, start)
        again = [backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss for step in range(2, 4)]
        np.testing.assert_allclose(again, losses, rtol=1e-4)
    backend.close()


_SINGLE = {"tp": 1, "pp": 1, "dp": 1, "vp": 1, "zero": 0}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("before", "after", "settings"),
    [
        ({"tp": 2, "zero": 0}, [{"dp": 2, "zero": 1}, {"pp": 2, "vp": 2}], {}),
        ({"dp": 2, "zero": 1}, [{"tp": 2}, {"pp": 2, "zero": 1}], {"precision": "bf16", "staging_bytes": 3000}),
    ],
    ids=str,
)
def test_any_layout_reads_what_any_layout_wrote(
    before: dict[str, Any], after: list[dict[str, Any]], settings: dict[str, Any], tmp_path: Path
) -> None:
    run_ranks(2, _save_and_load, tmp_path / "saved", before, after, False, settings)


@pytest.mark.dist
def test_a_model_that_copus_has_no_line_about_resumes(tmp_path: Path) -> None:
    layouts = [{"tp": 2, "dp": 2, "zero": 1}, {"pp": 2, "dp": 2}]
    run_ranks(4, _save_and_load, tmp_path / "saved", {"dp": 4}, layouts, True, {"precision": "bf16"})


def _resume(folder: Path, layout: dict[str, Any]) -> list[float]:
    job = json.loads((folder / "job.json").read_text())
    megatron_model.hide_padding = lambda *arguments, **options: None  # it was in the softmax of those versions
    backend = backend_of(tiny_job(2, layout, job["model"], micro_batch=2, precision=job["precision"]))
    backend.load(folder / "checkpoint", optimizer_steps=3)
    return [backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss for step in range(3, 7)]


@pytest.mark.dist
@pytest.mark.parametrize("case", ["tensor-parallel", "pipeline", "distributed-optimizer", "megatron-names"])
def test_checkpoints_of_earlier_versions_are_read(case: str, tmp_path: Path) -> None:
    with tarfile.open(FORMER) as archive:
        archive.extractall(tmp_path, filter="data")
    job = json.loads((tmp_path / case / "job.json").read_text())
    for layout in (job["layout"], {"dp": 2, "zero": 1}):
        losses = run_ranks(2, _resume, tmp_path / case, layout)[0]
        np.testing.assert_allclose(losses, job["losses"], rtol=1e-4 if job["precision"] == "bf16" else 1e-6)


FIELDS = (Field("w", "float32", (4096, 512)), Field("w/exp_avg", "float32", (4096, 512)))


def _little_memory(folder: Path, staging_bytes: int) -> tuple[int, int]:
    """16 MB on each rank, half of which two replicas share; most memory beyond the state, to save and to load."""
    rank = dist.get_rank()
    shared, own = Box((0, 0), (2048, 512)), Box((2048, 128 * (rank % 4)), (2048, 128))
    table = ShardTable.of((number, FIELDS, box) for number in range(4) for box in (shared, _own(number)))
    assert own == _own(rank)
    generator = torch.Generator().manual_seed(1)
    whole = {field.name: torch.randn(field.shape, generator=generator) for field in FIELDS}
    slices = {box.offset: box.slices_in(Box.whole((4096, 512))) for box in (shared, own)}
    live = {(name, start): whole[name][where].clone() for name in whole for start, where in slices.items()}
    expected = {place: tensor.double().sum() for place, tensor in live.items()}
    del whole
    state = {place: lambda place=place: live[place] for place in live}
    owned = owned_parts(table)
    extras: dict[str, list[int]] = {"save": [], "load": []}
    for checkpoint in (folder / str(number) for number in range(4)):
        if rank == 0:
            checkpoint.mkdir(parents=True)
        dist.barrier()
        for action in extras:
            reset_peak_memory()
            before = resident_bytes()
            if action == "save":
                save = Save(checkpoint, owned, state, staging_bytes, copy=False)
                save.write()
                save.finish()
                for tensor in live.values():
                    tensor.zero_()
            else:
                sources = find_sources(read_index(checkpoint), table)
                load(checkpoint, sources, owned, table, state, staging_bytes, own_device())
            extras[action].append((peak_memory_bytes() or 0) - before)
            dist.barrier()
        assert all(tensor.double().sum() == expected[place] for place, tensor in live.items())
    # The first round loads modules and fills the allocator's pools, which stay; gloo frees a buffer late at times.
    return min(extras["save"][1:]), min(extras["load"][1:])


def _own(rank: int) -> Box:
    return Box((2048, 128 * rank), (2048, 128))


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@pytest.mark.dist
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells of a peak")
def test_neither_way_takes_more_than_the_staging_bytes(tmp_path: Path) -> None:
    staging_bytes = 4 * 2**20
    for save_bytes, load_bytes in run_ranks(4, _little_memory, tmp_path / "saved", staging_bytes):
        assert save_bytes <= 1.25 * staging_bytes
        assert load_bytes <= 1.25 * staging_bytes


def test_no_rank_reads_more_than_the_limit_in_a_window() -> None:
    rows = [(rank, FIELDS, Box((1024 * rank, 0), (1024, 512))) for rank in range(4)]
    reading, window = _windows(ShardTable.of(rows), limit=300_000)
    assert reading.bytes.sum() == 2 * 4 * 4096 * 512
    for number in range(window.max() + 1):
        rows_of_window = np.flatnonzero(window == number)
        assert np.bincount(reading.rank[rows_of_window], weights=reading.bytes[rows_of_window]).max() <= 300_000


def test_another_model_is_refused_by_name() -> None:
    table = ShardTable.of([(0, FIELDS[:1], Box.whole((4096, 512)))])
    with pytest.raises(ValueError, match="the checkpoint has no w: another model or optimizer wrote it"):
        find_sources({}, table)
    with pytest.raises(
        ValueError, match=r"w is float32 \[4096\] in the checkpoint, and w is float32 \[4096, 512\] in this"
    ):
        find_sources({Field("w", "float32", (4096,)): []}, table)
    with pytest.raises(ValueError, match="the checkpoint has v, which this job's model does not have"):
        find_sources({FIELDS[0]: [], Field("v", "float32", (2,)): []}, table)
    with pytest.raises(ValueError, match=r"w is bfloat16 \[4096, 512\] in the checkpoint, and w is float32"):
        find_sources({FIELDS[0]._replace(dtype="bfloat16"): []}, table)


def test_the_precision_may_change_since_the_fp32_numbers_are_what_counts() -> None:
    fp32, moment = FIELDS
    bf16, master = fp32._replace(dtype="bfloat16"), Field("w/master", "float32", fp32.shape)
    everything = {name: field for name, field in [("fp32", fp32), ("bf16", bf16), ("master", master)]}

    def sources(saved: list[str], wanted: str) -> str:
        table = ShardTable.of([(0, (everything[wanted], moment), Box.whole(fp32.shape))])
        found = find_sources({field: [] for field in [*(everything[name] for name in saved), moment]}, table)
        assert found[moment.name][0] == moment
        return next(name for name, field in everything.items() if field == found[everything[wanted].name][0])

    assert [sources(["fp32"], wanted) for wanted in everything] == ["fp32"] * 3
    assert [sources(["bf16", "master"], wanted) for wanted in everything] == ["master", "bf16", "master"]
    assert [sources(["master"], wanted) for wanted in everything] == ["master"] * 3, "as FSDP keeps bf16 models"
