"""Weights from Hugging Face folders into any backend and layout, and back: what transformers computes, copus does."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest, StepRules
from copus.checkpoints.sharded import find_sources, load
from copus.hardware import peak_memory_bytes, reset_peak_memory
from copus.job import JobConfig, dump_job, parse_job
from copus.manifest import describe, files_of, write_manifest
from copus.reshard.boxes import Box
from copus.reshard.table import Field, ShardTable
from copus.weights.__main__ import export
from copus.weights.pretrained import keep_small_files
from copus.weights.saved import begin, read_source
from copus.weights.source import find_source
from tests.megatron_jobs import save_checkpoint
from tests.pretrained import ON_MEGATRON, SEQ_LEN, VOCAB, WITH_TRANSFORMERS, open_folder, save_tiny, tokens
from tests.ranks import own_device, run_ranks
from tests.test_sharded_checkpoint import resident_bytes


def job_from(
    folder: Path, backend: str = "megatron", layout: dict[str, Any] | None = None, **training: Any
) -> JobConfig:
    """A job that begins with the weights of a folder."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    settings = {"layout": layout or {"dp": ranks}, "global_batch": 4, "tokens": 100_000, "evaluate_sequences": 4}
    values = {
        "name": "tuned",
        "model": {"from": str(folder), "seq_len": SEQ_LEN},
        "cluster": {"accelerators_per_node": ranks},
        "training": {**settings, "backend": backend, "init_from": str(folder), **training},
    }
    return parse_job(values)


def begun(job: JobConfig) -> Any:
    """The job's backend with the weights that the job begins with."""
    backend = find_backend(job.training.backend).load()(job, own_device())
    begin(job, backend)
    return backend


def batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the same as labels one ahead."""
    rows = tokens(first + count)[first:]
    return rows, rows.roll(-1, 1)


def loss_of(model: Any) -> float:
    """What transformers' model has on these batches."""
    inputs, labels = batches(0, 4)
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def logits_of(backend: Any) -> torch.Tensor:
    """Of a backend on one rank."""
    inputs = tokens()
    with torch.no_grad():
        if hasattr(backend.built, "chunks"):
            positions = torch.arange(SEQ_LEN).expand_as(inputs)
            logits = backend.built.chunks[0].eval()(inputs, positions, None)
        else:
            logits = backend.built.model.eval()(input_ids=inputs).logits
    return logits[..., :VOCAB]


def make_run(run: Path, job: JobConfig, backend: Any, **state: Any) -> Path:
    """A run with one checkpoint, of the state of a backend and that of a trainer. Collective."""
    checkpoint = run / "checkpoints" / "samples-000000000004"
    save_checkpoint(backend, checkpoint)
    if dist.get_rank() == 0:
        (run / "job.yaml").write_text(dump_job(job))
        assert job.training.init_from is not None
        keep_small_files(run, find_source(job.training.init_from))
        state = {"samples_consumed": 4, "step": 1, "data": "0123456789abcdef"} | state
        configuration = backend.configuration.model_dump(mode="json")
        (checkpoint / "trainer.json").write_text(json.dumps({"state": state, "configuration": configuration}))
        write_manifest(checkpoint, describe(checkpoint, files_of(checkpoint)))
    dist.barrier()
    return checkpoint


def _logits_of_all(folder: Path, backend: str, families: list[str]) -> dict[str, np.ndarray]:
    """Of each family's weights on one rank, which are then saved in a run."""
    logits = {}
    for family in families:
        job = job_from(folder / family, backend)
        running = begun(job)
        logits[family] = logits_of(running).numpy()
        make_run(folder / f"run-{family}", job, running)
        running.close()
    return logits


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the safetensors files of a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


NORMS_LESS_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("backend", "families"),
    [("megatron", ON_MEGATRON), pytest.param("fsdp", WITH_TRANSFORMERS, marks=pytest.mark.slow)],
)
def test_each_family_computes_the_same_before_and_after(backend: str, families: list[str], tmp_path: Path) -> None:
    """Logits of what transformers saved: in copus, and of what copus exports; whose tensors are the same bytes."""
    for family in families:
        save_tiny(family, tmp_path / family)
    logits = run_ranks(1, _logits_of_all, tmp_path, backend, families)[0]
    for family in families:
        expected = open_folder(tmp_path / family)(input_ids=tokens()).logits.detach()
        np.testing.assert_allclose(logits[family], expected, rtol=0, atol=1e-4, err_msg=family)
        run, exported = tmp_path / f"run-{family}", tmp_path / f"exported-{family}"
        job = job_from(tmp_path / family, backend)
        export(run, job, run / "checkpoints" / "samples-000000000004", exported, "hf", "fp32")
        again = open_folder(exported)(input_ids=tokens()).logits.detach()
        np.testing.assert_allclose(again, expected, rtol=0, atol=1e-4, err_msg=family)
        before, after = all_tensors(tmp_path / family), all_tensors(exported)
        assert before.keys() == after.keys()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert all(family in NORMS_LESS_ONE and "norm" in name for name in changed), (family, changed)


LAYOUTS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "megatron": [({"tp": 2}, {}), ({"pp": 2}, {"staging_bytes": 3000}), ({"dp": 2, "zero": 1}, {"precision": "bf16"})],
    "fsdp": [({"tp": 2}, {}), ({"dp": 2, "zero": 3}, {"precision": "bf16"})],
    "deepspeed": [({"dp": 2, "zero": 3}, {}), ({"dp": 2, "zero": 1}, {"precision": "bf16"})],
}


def _losses_of_layouts(folder: Path, backend: str) -> list[float]:
    """The first loss in each layout. What a bf16 job begins with is saved in a run, and begun with again in fp32."""
    losses = []
    for layout, settings in LAYOUTS[backend]:
        job = job_from(folder / "model", backend, layout, **settings)
        running = begun(job)
        losses.append(running.evaluate(batches, 4))
        if "precision" in settings:
            make_run(folder / "run", job, running)
        running.close()
    again = begun(job_from(folder / "model", backend, {"dp": 2}, init_from=str(folder / "run")))
    losses.append(again.evaluate(batches, 4))
    assert again.optimizer_steps == 0
    assert not any(read().any() for (name, _), read in again.live_state().items() if "exp_avg" in name)
    again.close()
    return losses


@pytest.mark.dist
@pytest.mark.parametrize("backend", ["megatron", "fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_the_first_loss_is_that_of_transformers_in_any_layout(backend: str, tmp_path: Path) -> None:
    """Tied embeddings, biases, and a vocabulary that is padded. A bf16 job keeps every digit of the folder, in its
    masters: what is exported in fp32 are the bytes that came in."""
    save_tiny("qwen2", tmp_path / "model")
    expected = loss_of(open_folder(tmp_path / "model"))
    losses = run_ranks(2, _losses_of_layouts, tmp_path, backend)[0]
    for (layout, settings), loss in zip([*LAYOUTS[backend], ({}, {})], losses, strict=True):
        assert loss == pytest.approx(expected, rel=3e-2 if "precision" in settings else 1e-5), layout
    job = job_from(tmp_path / "model")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    export(tmp_path / "run", job, checkpoint, tmp_path / "exported", "hf", "fp32")
    before, after = all_tensors(tmp_path / "model"), all_tensors(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "bf16"), pytest.param(torch.float16, "fp16", marks=pytest.mark.slow)]
)
def test_a_folder_in_half_precision_comes_out_as_it_went_in(dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "gpt2", dtype)
    run_ranks(1, _logits_of_all, tmp_path, "megatron", ["gpt2"])
    run = tmp_path / "run-gpt2"
    job = job_from(tmp_path / "gpt2")
    export(run, job, next((run / "checkpoints").iterdir()), tmp_path / "exported", "hf", precision)  # type: ignore[arg-type]
    before, after = all_tensors(tmp_path / "gpt2"), all_tensors(tmp_path / "exported")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _steps(backend: Any, first: int) -> list[float]:
    requests = [StepRequest(4 * step, StepRules(lr=1e-2, betas=(0.8, 0.96))) for step in range(first, first + 3)]
    return [backend.train_step(batches, request).loss for request in requests]


GO_ON = [("megatron", {"dp": 2, "zero": 1}), ("fsdp", {"dp": 2, "zero": 3})]


def _go_on(folder: Path) -> list[list[float]]:
    """Losses of three steps of a run, and then of jobs that begin with its checkpoint and its optimizer's state."""
    job = job_from(folder / "model", "megatron", {"tp": 2})
    running = begun(job)
    _steps(running, 0)
    make_run(folder / "run", job, running, optimizer_steps=3, beta2_product=0.96**3)
    losses = [_steps(running, 3)]
    running.close()
    for backend, layout in GO_ON:
        settings = {"init_from": str(folder / "run"), "init_optimizer": True}
        running = begun(job_from(folder / "model", backend, layout, **settings))
        assert running.optimizer_steps == 3
        losses.append(_steps(running, 3))
        running.close()
    return losses


@pytest.mark.dist
def test_a_job_that_begins_with_a_runs_optimizer_trains_on_as_the_run_does(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path / "model")
    expected, *others = run_ranks(2, _go_on, tmp_path)[0]
    assert len(set(expected)) == 3
    for (backend, layout), losses in zip(GO_ON, others, strict=True):
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=f"{backend} {layout}")


ROWS = 2**15
"""Of the large tensors, of 32 MiB each: the embedding, and in GPT-2 the transposed matrices of the MLP."""


def _memory_of_import(folder: Path, family: str, staging_bytes: int) -> int:
    """Most memory beyond this rank's share of the weights that reading them takes."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    saved = read_source(find_source(folder), job_from(folder).model)
    rows = [(number, field, _share(field, number, ranks)) for field in saved for number in range(ranks)]
    table = ShardTable.of((number, (field,), box) for number, field, box in rows)
    live = {(field.name, box.offset): torch.zeros(box.shape) for number, field, box in rows if number == rank}
    state = {place: lambda place=place: live[place] for place in live}
    sources = find_sources(saved, table, begins_anew=True)
    extras = []
    for _ in range(4):
        dist.barrier()
        reset_peak_memory()
        before = resident_bytes()
        load(folder, sources, table, table, state, staging_bytes, own_device())
        extras.append((peak_memory_bytes() or 0) - before)
    assert all(part.any() for part in live.values())
    return min(extras[1:])  # the first time loads modules and fills the allocator's pools, which stay


def _share(field: Field, rank: int, ranks: int) -> Box:
    rows = field.shape[0] // ranks
    return Box((rank * rows, *[0] * (len(field.shape) - 1)), (rows, *field.shape[1:]))


@pytest.mark.dist
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells of a peak")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"vocab_size": ROWS, "hidden_size": 256}),
        ("gpt2", {"n_embd": 256, "n_inner": ROWS, "n_layer": 1}),
    ],
)
def test_no_rank_holds_more_than_its_share_and_one_tensor(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Of a transposed matrix a share's numbers lie all over the file, whose pages are mapped while it is read. Alone,
    reading takes the staging bytes; in the whole suite ranks were seen to take 1.4 times those."""
    save_tiny(family, tmp_path / family, **settings)
    staging_bytes, tensor_bytes = 4 * 2**20, 4 * 256 * ROWS
    extras = run_ranks(2, _memory_of_import, tmp_path / family, family, staging_bytes)
    for extra in extras:
        assert extra <= 1.75 * staging_bytes + (tensor_bytes if family == "gpt2" else 0)
