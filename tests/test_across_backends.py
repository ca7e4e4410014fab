"""One job on any framework: what Megatron trains is a transformers model, and back, to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from copus.backends.huggingface import build_causal_lm, mean_loss
from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest
from copus.checkpoints.sharded import read_index
from tests.megatron_jobs import RULES, backend_of, random_batches, save_checkpoint, tiny_job
from tests.ranks import own_device, run_ranks

MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {"kv_heads": 2},
    "tied embeddings, padded vocabulary": {"tied_embeddings": True, "vocab": 130},
    "no gate": {"gated_mlp": False},
}


def _train(folder: Path, model: dict[str, Any], precision: str) -> list[float]:
    """The losses of two steps, whose end a checkpoint holds, and of held-out sequences then."""
    backend = backend_of(tiny_job(dist.get_world_size(), {"tp": 2, "pp": 2}, model, precision=precision))
    losses = [backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss for step in range(2)]
    save_checkpoint(backend, folder)
    losses.append(backend.evaluate(random_batches, 8))
    backend.close()
    return losses


def _train_all(folder: Path) -> dict[str, list[float]]:
    return {name: _train(folder / name, model, "fp32") for name, model in MODELS.items()}


def _load(folder: Path, again: Path, layout: dict[str, Any], model: dict[str, Any], precision: str) -> float:
    """Loss of held-out sequences with the weights of a checkpoint, which is written again."""
    backend = backend_of(tiny_job(dist.get_world_size(), layout, model, precision=precision))
    backend.load(folder, optimizer_steps=2)
    save_checkpoint(backend, again)
    loss = backend.evaluate(random_batches, 8)
    backend.close()
    return loss


def _load_all(folder: Path, again: Path) -> dict[str, float]:
    return {name: _load(folder / name, again / name, {}, model, "fp32") for name, model in MODELS.items()}


def _state(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, as torch's own reader reads it."""
    state = {field.name: torch.empty(field.shape, dtype=getattr(torch, field.dtype)) for field in read_index(folder)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(str(folder)), no_dist=True)
    return state


@pytest.mark.dist
def test_megatron_and_transformers_exchange_checkpoints(tmp_path: Path) -> None:
    """From TP2·PP2 into a transformers model, which has the same loss; from that into one rank of Megatron, where
    everything is what it was, moments included."""
    states = {}
    losses = run_ranks(4, _train_all, tmp_path / "megatron")[0]
    for name, model in MODELS.items():
        shape = tiny_job(1, model=model).model
        theirs = build_causal_lm(shape, torch.float32, torch.device("cpu"), seed=1234)
        first = mean_loss(theirs, *random_batches(0, 8)).item()
        assert first == pytest.approx(losses[name][0], rel=1e-6), "the initial weights are the same, too"

        states[name] = state = _state(tmp_path / "megatron" / name)
        weights = {name: tensor for name, tensor in state.items() if "/" not in name}
        missing, unexpected = theirs.load_state_dict(weights, strict=False)
        assert unexpected == []
        assert missing == (["lm_head.weight"] if shape.tied_embeddings else [])
        assert mean_loss(theirs, *random_batches(0, 8)).item() == pytest.approx(losses[name][-1], rel=1e-6)

        own = {name: tensor.detach() for name, tensor in theirs.named_parameters()}
        moments = {name: tensor for name, tensor in state.items() if "/" in name}
        assert {*moments} == {f"{name}/{statistic}" for name in own for statistic in ("exp_avg", "exp_avg_sq")}
        writer = dcp.FileSystemWriter(str(tmp_path / "transformers" / name))
        dcp.save(own | moments, storage_writer=writer, no_dist=True)

    again = run_ranks(1, _load_all, tmp_path / "transformers", tmp_path / "again")[0]
    for name, state in states.items():
        assert again[name] == pytest.approx(losses[name][-1], rel=1e-6)
        _assert_equal(_state(tmp_path / "again" / name), state)


def _assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def _change_precision(folder: Path) -> None:
    _train(folder / "bf16", {}, "bf16")
    _load(folder / "bf16", folder / "fp32", {"dp": 4, "zero": 1}, {}, "fp32")
    _load(folder / "fp32", folder / "bf16 again", {"tp": 2, "dp": 2}, {}, "bf16")


@pytest.mark.dist
@pytest.mark.slow
def test_a_job_goes_on_in_another_precision(tmp_path: Path) -> None:
    """bf16 → fp32 → bf16: the masters become the weights and masters again, to the bit."""
    run_ranks(4, _change_precision, tmp_path)
    before, between, after = (_state(tmp_path / name) for name in ("bf16", "fp32", "bf16 again"))
    _assert_equal(after, before)
    _assert_equal(between, {name: before.get(f"{name}/master", before[name]) for name in between})


MEGATRON = ("megatron", {"tp": 2, "pp": 2})
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("fsdp", {"tp": 2, "dp": 2, "zero": 3}),
    ("deepspeed", {"dp": 4, "zero": 3}),
]


def _go_on(folder: Path, backend: str, layout: dict[str, Any], precision: str, first: int) -> list[float]:
    """The losses of two steps on a backend, from a checkpoint or from the beginning, and a checkpoint of the end."""
    job = tiny_job(dist.get_world_size(), layout, {"kv_heads": 2}, backend=backend, precision=precision)
    running = find_backend(backend).load()(job, own_device())
    running.build(job.training.configuration)
    if first:
        running.load(folder / f"after {first}", optimizer_steps=first)
        save_checkpoint(running, folder / f"after {first}, again")
    losses = [running.train_step(random_batches, StepRequest(8 * step, RULES)).loss for step in (first, first + 1)]
    save_checkpoint(running, folder / f"after {first + 2}")
    running.close()
    return losses


def _go_through(folder: Path, places: list[tuple[str, dict[str, Any]]], precision: str) -> tuple[Any, Any]:
    """The losses of two steps on each backend in turn, and of as many on Megatron alone."""
    sizes = range(0, 2 * len(places), 2)
    losses = [_go_on(folder / "all", *place, precision, first) for place, first in zip(places, sizes, strict=True)]
    alone = [_go_on(folder / "alone", *MEGATRON, precision, first) for first in sizes]
    return losses, alone


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_one_job_goes_through_all_backends(precision: str, tmp_path: Path) -> None:
    """What each takes up is what the one before left, to the bit, and the losses are those of one framework."""
    places = [MEGATRON, *OTHERS, MEGATRON]
    losses, alone = run_ranks(4, _go_through, tmp_path, places, precision)[0]
    np.testing.assert_allclose(losses, alone, rtol=1e-3 if precision == "bf16" else 1e-5)
    for number in range(1, len(places)):
        left = _numbers(_state(tmp_path / "all" / f"after {2 * number}"))
        _assert_equal(_numbers(_state(tmp_path / "all" / f"after {2 * number}, again")), left)


def _numbers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What training goes on from: Adam's moments, and of each weight the master if it has one."""
    names = {name.partition("/")[0] for name in state}
    weights = {name: state.get(f"{name}/master", state.get(name)) for name in names}
    return {name: tensor for name, tensor in {**state, **weights}.items() if not name.endswith("/master")}
