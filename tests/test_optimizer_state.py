"""What every optimizer keeps moves and is written to the bit: training goes on as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest
from copus.checkpoints.sharded import read_index
from copus.checkpoints.trainer_state import TrainerState
from copus.job import JobConfig
from copus.schedule import rules_at
from tests.megatron_jobs import configuration, random_batches, save_checkpoint, tiny_job
from tests.ranks import own_device, run_ranks

MODEL = {"kv_heads": 2, "layers": 2}
KEPT = {
    "adamw": {"exp_avg", "exp_avg_sq"},
    "sgd": set(),
    "sgd with momentum": {"momentum_buffer"},
    "adafactor": {"row_sq", "column_sq", "exp_avg_sq"},
    "muon": {"exp_avg", "exp_avg_sq"},
    "signum": {"exp_avg"},
    "signum without masters": {"exp_avg"},
    "adamw without masters": {"exp_avg", "exp_avg_sq"},
    "sgd without masters": set(),
    "adafactor without masters": {"row_sq", "column_sq", "exp_avg_sq"},
}
Layouts = list[dict[str, Any]]


def _job(kind: str, backend: str, layout: dict[str, Any]) -> JobConfig:
    name = kind.partition(" ")[0]
    optimizer = {"kind": name, **({"momentum": 0.9} if "momentum" in kind else {})}
    lean = {"precision": "bf16", "master_weights": "none"} if "without masters" in kind else {}
    ranks = dist.get_world_size()
    return tiny_job(ranks, layout, MODEL, backend=backend, optimizer=optimizer, micro_batch=2, lr=3e-3, **lean)


def _train(running: Any, job: JobConfig, steps: range) -> list[float]:
    state = TrainerState()
    return [running.train_step(random_batches, StepRequest(8 * step, rules_at(job, state, 8))).loss for step in steps]


def _go_on(kind: str, backend: str, layouts: Layouts, folder: Path) -> set[str]:
    """Two steps, and two more: at once, after a tour through layouts, and after a restart from a checkpoint. Returns
    the names of what is kept of weights."""
    job = _job(kind, backend, layouts[0])
    running = find_backend(backend).load()(job, own_device())
    running.build(job.training.configuration)
    _train(running, job, range(2))
    save_checkpoint(running, folder)
    before = {place: tensor().clone() for place, tensor in running.live_state().items()}
    for layout in [*layouts[1:], layouts[0]]:
        running.move(configuration(8, 2, **layout))
    after = {place: tensor() for place, tensor in running.live_state().items()}
    assert before.keys() == after.keys()
    assert [place for place in before if not torch.equal(before[place], after[place])] == []
    losses = _train(running, job, range(2, 4))

    running.build(job.training.configuration)
    running.load(folder, optimizer_steps=2)
    assert _train(running, job, range(2, 4)) == losses
    running.build(job.training.configuration)
    assert _train(running, job, range(4))[2:] == losses, "as it would have gone without either"
    running.release()
    return {field.name.rpartition("/")[2] for field in read_index(folder) if "/" in field.name}


def _all_go_on(kinds: list[str], backend: str, layouts: Layouts, folder: Path) -> dict[str, set[str]]:
    return {kind: _go_on(kind, backend, layouts, folder / kind) for kind in kinds}


def _check(ranks: int, kinds: list[str], backend: str, layouts: Layouts, folder: Path) -> None:
    for kept in run_ranks(ranks, _all_go_on, kinds, backend, layouts, folder, timeout_seconds=600):
        assert kept == {kind: KEPT[kind] for kind in kinds}


@pytest.mark.dist
def test_state_of_megatrons_optimizers_survives_moves_and_restarts(tmp_path: Path) -> None:
    """Through fused matrices that tensor parallel ranks cut, whose rows and columns Adafactor averages over; without
    masters what is rounded stochastically is rounded alike on every layout."""
    _check(2, ["adafactor", "signum without masters"], "megatron", [{"tp": 2}, {"dp": 2}, {"pp": 2}], tmp_path)


@pytest.mark.dist
def test_state_of_fsdps_optimizers_survives_moves_and_restarts(tmp_path: Path) -> None:
    """Without masters too: what is rounded stochastically is rounded alike the second time."""
    kinds = ["sgd with momentum", "adafactor without masters"]
    _check(2, kinds, "fsdp", [{"dp": 2, "zero": 3}, {"tp": 2}, {"dp": 2}], tmp_path)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "backend", "layouts"),
    [
        (
            ["sgd", "sgd with momentum", "adafactor", "signum"],
            "megatron",
            [{"tp": 2, "pp": 2}, {"dp": 4}, {"tp": 2, "dp": 2}],
        ),
        (
            ["adamw", "sgd with momentum", "signum"],
            "megatron",
            [{"dp": 4, "zero": 1}, {"tp": 2, "dp": 2, "zero": 1}, {"pp": 2, "dp": 2}],
        ),
        (
            ["sgd without masters", "adamw without masters", "adafactor without masters"],
            "megatron",
            [{"tp": 2, "pp": 2}, {"dp": 4}, {"tp": 2, "dp": 2}],
        ),
        (["adamw"], "deepspeed", [{"dp": 4, "zero": 1}, {"dp": 4, "zero": 2}, {"dp": 4, "zero": 3}]),
        (["muon"], "megatron", [{"pp": 2, "dp": 2}, {"dp": 4}]),
        (["muon"], "fsdp", [{"dp": 4}, {"dp": 4, "recompute": "full"}]),
        (
            ["adamw", "sgd", "adafactor", "signum", "adamw without masters", "adafactor without masters"],
            "fsdp",
            [{"dp": 4, "zero": 2}, {"tp": 2, "dp": 2, "zero": 3}, {"dp": 4, "zero": 1, "dp_replicate": 2}],
        ),
    ],
    ids=str,
)
def test_state_survives_moves_and_restarts_on_four_ranks(
    kinds: list[str], backend: str, layouts: Layouts, tmp_path: Path
) -> None:
    _check(4, kinds, backend, layouts, tmp_path)


def _losses(kind: str, backend: str, layouts: Layouts) -> list[list[float]]:
    """Losses of four steps from the beginning, in each layout."""
    job = _job(kind, backend, layouts[0])
    running = find_backend(backend).load()(job, own_device())
    losses = []
    for layout in layouts:
        running.build(configuration(8, 2, **layout))
        losses.append(_train(running, job, range(4)))
    running.close()
    return losses


def _losses_everywhere(kind: str, places: dict[str, Layouts]) -> list[list[float]]:
    return [losses for backend, layouts in places.items() for losses in _losses(kind, backend, layouts)]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["adafactor", pytest.param("muon", marks=pytest.mark.slow)])
def test_an_optimizer_is_the_same_on_every_backend_and_layout(kind: str) -> None:
    """Its figures are of the tensors of the state: fused or not, cut or not."""
    whole: dict[str, Layouts] = {"megatron": [{"dp": 2}], "fsdp": [{"dp": 2}]}
    cut: dict[str, Layouts] = {"megatron": [{"dp": 2}, {"tp": 2}], "fsdp": [{"dp": 2, "zero": 3}, {"tp": 2}]}
    losses = run_ranks(2, _losses_everywhere, kind, cut if kind == "adafactor" else whole)[0]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5 if kind == "adafactor" else 1e-4)
